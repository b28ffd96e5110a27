-- Returns the fingerprint of keys, for prune.lua.
-- KEYS: the compared keys
-- ARGV: how many they are
-- Reply: the fingerprint

-- include: ops/lua/fingerprint.lua

return fingerprint()
