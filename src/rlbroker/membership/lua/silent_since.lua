-- Gives since when a member is silent, in milliseconds, nil for who is none. The time before the learner came back
-- does not count: nobody could be heard of then.

local function heard_of(life, meta)
  local found = redis.call('HMGET', life, 'member', 'seen')
  if found[1] ~= '1' then return nil end
  return math.max(tonumber(found[2]) or 0, tonumber(redis.call('HGET', meta, 'back_at') or '0') or 0)
end
