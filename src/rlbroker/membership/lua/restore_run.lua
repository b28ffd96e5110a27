-- KEYS: meta, workers, then the life of each worker that took part
-- ARGV: the learner's epoch, its name, the epoch of the learner that leads, as far as it knows,
--       these workers in order, each with its incarnation and 1 for a member, as one text,
--       then field and value pairs for the learner that leads
-- Gives when it was, and the members that the server had lost.

-- include: backend/lua/also_when_full.lua

local mine = tonumber(ARGV[1])
local named = 'learner:' .. ARGV[2]
if (tonumber(redis.call('HGET', KEYS[1], named) or '0') or 0) > mine then
  return redis.error_reply('FENCED a newer learner with this name has taken over the run')
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local reply, place = {now}, 3
-- Word by word: to look for all three parts in the whole text takes time that grows with its square, and workers
-- can call this too.
for word in string.gmatch(ARGV[4], '[^,]+') do
  local worker, incarnation, member = string.match(word, '^(%d+):(%d+):(%d)$')
  local life = KEYS[place]
  place = place + 1
  local there = redis.pcall('HMGET', life, 'incarnation', 'member')  -- a worker may have put something else there
  if not there['err'] and (tonumber(there[1] or '0') or 0) < tonumber(incarnation) then
    redis.call('SADD', KEYS[2], worker)
    redis.call('HSET', life, 'incarnation', incarnation)
    -- It comes back by itself, or is given up soon.
    if member == '1' and there[2] ~= '1' then
      redis.call('HSET', life, 'member', '1', 'seen', now)
      table.insert(reply, worker)
    end
  end
end
local leading = tonumber(ARGV[3])
redis.call('HSET', KEYS[1], named, ARGV[1], 'back_at', now)
if (tonumber(redis.call('HGET', KEYS[1], 'epochs') or '0') or 0) < math.max(mine, leading) then
  redis.call('HSET', KEYS[1], 'epochs', string.format('%.0f', math.max(mine, leading)))
end
local there = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0
if there < leading then redis.call('HSET', KEYS[1], 'epoch', ARGV[3]) end
-- Another learner may have written the epoch of this one back, but not what only this one knows.
if leading == mine and (there < mine or redis.call('HEXISTS', KEYS[1], 'wire_format') == 0) then
  redis.call('HSET', KEYS[1], unpack(ARGV, 5))
end
return reply
