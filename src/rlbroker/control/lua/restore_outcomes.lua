-- KEYS: meta, a worker's ledger
-- ARGV: the learner's epoch, incarnation and number of the account's last event, then field and value pairs

if (tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0) > tonumber(ARGV[1]) then
  return redis.error_reply('FENCED a newer learner publishes in this run')
end
local event = redis.call('HGET', KEYS[2], 'event') or '0-0'
local life, number = string.match(event, '^(%d+)-(%d+)$')
life, number = tonumber(life), tonumber(number)
local later = tonumber(ARGV[2])
if life < later or (life == later and number < tonumber(ARGV[3])) then
  redis.call('DEL', KEYS[2])
  redis.call('HSET', KEYS[2], unpack(ARGV, 4))
end
return 1
