-- Settle one event of a worker: remove it, and write its effects in the same step.
-- KEYS: meta, the worker's acknowledgements, its ledger, missed, pending, then the outcomes of each settled command
-- ARGV: the learner's epoch, id of the event, worker id, lifetime of outcomes in seconds, length of `missed`,
--       number of missed records, number of values in each, the values of all records,
--       id and outcome of each settled command, then field and value pairs of the ledger
-- Reply: 1 if the event was settled now, 0 if it was settled before
-- Errors: FENCED, LOST

-- include: backend/lua/leader_only.lua

local removed = redis.pcall('XDEL', KEYS[2], ARGV[2])
if type(removed) ~= 'number' or removed == 0 then  -- an error: the worker has made its key another type
  return 0
end
local at, values = 8, tonumber(ARGV[7])
for _ = 1, tonumber(ARGV[6]) do
  redis.call('XADD', KEYS[4], 'MAXLEN', '~', ARGV[5], '*', unpack(ARGV, at, at + values - 1))
  at = at + values
end
for key = 6, #KEYS do
  redis.call('HDEL', KEYS[5], ARGV[at] .. ':' .. ARGV[3])
  redis.call('HSET', KEYS[key], ARGV[3], ARGV[at + 1])
  redis.call('EXPIRE', KEYS[key], ARGV[4])
  at = at + 2
end
redis.call('HSET', KEYS[3], unpack(ARGV, at))
return 1
