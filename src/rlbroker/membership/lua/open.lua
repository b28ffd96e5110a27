-- Open a run for a learner and issue its epoch. Works on a full server.
-- KEYS: meta
-- ARGV: wire format, the learner's name, '1' if it publishes, then field and value pairs
-- Reply: the learner's epoch; 1 if the run existed, else 0; the shards of the run
-- Errors: FORMAT and the run's wire format if it is another one

-- include: membership/lua/next_incarnation.lua
-- include: backend/lua/also_when_full.lua

local written = redis.call('HGET', KEYS[1], 'wire_format')
if written and written ~= ARGV[1] then
  return redis.error_reply('FORMAT ' .. written)
end
local epoch = next_incarnation(redis.call('HGET', KEYS[1], 'epochs'))
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'epochs', epoch, 'learner:' .. ARGV[2], epoch,
  'back_at', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
if ARGV[3] == '1' then
  redis.call('HSET', KEYS[1], 'epoch', epoch)
  redis.call('HDEL', KEYS[1], 'ended', 'ended_by', 'signed_with')  -- the fields have that of a learner with a key
end
if not written then redis.call('HDEL', KEYS[1], 'ended') end  -- `rlbroker prune` left it
-- A run that exists keeps its shards: batches may be waiting there.
local shards = redis.call('HGET', KEYS[1], 'shards')
if ARGV[3] == '1' or not written then
  redis.call('HSET', KEYS[1], 'wire_format', ARGV[1], unpack(ARGV, 4))
  if written then redis.call('HSET', KEYS[1], 'shards', shards or '') end
end
return {epoch, written and 1 or 0, redis.call('HGET', KEYS[1], 'shards') or ''}
