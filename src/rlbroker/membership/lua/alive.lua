-- Record in `meta` that the learner is alive. Works on a full server.
-- KEYS: meta
-- ARGV: field and value pairs
-- Reply: the number of fields that were added

-- include: backend/lua/also_when_full.lua

return redis.call('HSET', KEYS[1], unpack(ARGV))
