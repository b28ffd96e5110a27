-- Function: return the time since which a worker is silent, in milliseconds; nil if it is not a member. Silence before
-- the learner opened or restored the run does not count: the server may have been unreachable then.

local function silent_since(life, meta)
  local found = redis.call('HMGET', life, 'member', 'seen')
  if found[1] ~= '1' then return nil end
  return math.max(tonumber(found[2]) or 0, tonumber(redis.call('HGET', meta, 'back_at') or '0') or 0)
end
