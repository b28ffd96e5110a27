-- Fence older epochs of a learner: the server refuses their acknowledgements from now on.
-- KEYS: the epochs of a worker's learners, its counts
-- ARGV: the learner's name, its epoch
-- Reply: the counts, as HGETALL returns them

-- include: backend/lua/also_when_full.lua

if tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0') < tonumber(ARGV[2]) then
  redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
end

-- include: experience/lua/ensure_counts.lua

return redis.call('HGETALL', KEYS[2])
