-- Write back a worker's outcomes, unless the server has those of a later event.
-- KEYS: meta, the worker's ledger
-- ARGV: the learner's epoch, incarnation and number of the last event in the outcomes, then field and value pairs
-- Reply: 1
-- Errors: FENCED if a newer learner publishes

if (tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0) > tonumber(ARGV[1]) then
  return redis.error_reply('FENCED a newer learner publishes in this run')
end
local event = redis.call('HGET', KEYS[2], 'event') or '0-0'
local incarnation, number = string.match(event, '^(%d+)-(%d+)$')
incarnation, number = tonumber(incarnation), tonumber(number)
local remembered = tonumber(ARGV[2])
if incarnation < remembered or (incarnation == remembered and number < tonumber(ARGV[3])) then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[2], unpack(ARGV, 4))
end
return 1
