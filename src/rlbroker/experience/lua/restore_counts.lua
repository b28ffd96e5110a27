-- Raise a worker's counts to those that a learner remembers, where the server has lost some. What the worker counts is
-- raised only if the server has lost the learner's epoch too.
-- KEYS: the epochs of a worker's learners, its counts
-- ARGV: the learner's name, its epoch, number of fields that learners count, then these fields and values,
--       then every other field and value
-- Reply: 1

-- include: backend/lua/also_when_full.lua
-- include: experience/lua/ensure_counts.lua

local epoch = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0')
local last = epoch == 0 and #ARGV or 3 + 2 * tonumber(ARGV[3])
for i = 4, last, 2 do
  local found = tonumber(redis.call('HGET', KEYS[2], ARGV[i]) or '0') or 0
  if found < tonumber(ARGV[i + 1]) then redis.call('HSET', KEYS[2], ARGV[i], ARGV[i + 1]) end
end
if epoch < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return 1
