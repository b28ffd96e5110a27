-- KEYS: meta
-- ARGV: field and value pairs that say when its learner was last alive

-- include: backend/lua/also_when_full.lua

return redis.call('HSET', KEYS[1], unpack(ARGV))
