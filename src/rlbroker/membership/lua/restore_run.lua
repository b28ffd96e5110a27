-- Write back the workers and the `meta` of a run that the server may have lost. Changes nothing where the server has
-- newer data. Works on a full server.
-- KEYS: meta, workers, then the life of each worker
-- ARGV: the learner's epoch, its name, the newest leading epoch that it knows, the same workers in the same order as
--       `worker:incarnation:member` separated by commas, then field and value pairs of the leading learner
-- Reply: the server's time in milliseconds, then the members that the server had lost
-- Errors: FENCED if a newer learner has this name

-- include: backend/lua/also_when_full.lua

local mine = tonumber(ARGV[1])
local named = 'learner:' .. ARGV[2]
if (tonumber(redis.call('HGET', KEYS[1], named) or '0') or 0) > mine then
  return redis.error_reply('FENCED a newer learner with this name has taken over the run')
end
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
local reply, place = {now}, 3
-- Split at the commas first: matching all three parts in the whole text takes quadratic time, and workers can call this
-- script too.
for word in string.gmatch(ARGV[4], '[^,]+') do
  local worker, incarnation, member = string.match(word, '^(%d+):(%d+):(%d)$')
  local life = KEYS[place]
  place = place + 1
  local stored = redis.pcall('HMGET', life, 'incarnation', 'member')  -- a worker may have made it another type
  if not stored['err'] and (tonumber(stored[1] or '0') or 0) < tonumber(incarnation) then
    redis.call('SADD', KEYS[2], worker)
    redis.call('HSET', life, 'incarnation', incarnation)
    -- The worker returns by itself, or the learner forgets it soon.
    if member == '1' and stored[2] ~= '1' then
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
local stored = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0
if stored < leading then redis.call('HSET', KEYS[1], 'epoch', ARGV[3]) end
-- Another learner may have written back the leading epoch, but only the leading learner knows the other fields.
if leading == mine and (stored < mine or redis.call('HEXISTS', KEYS[1], 'wire_format') == 0) then
  redis.call('HSET', KEYS[1], unpack(ARGV, 5))
end
return reply
