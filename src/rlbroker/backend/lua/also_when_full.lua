-- Include: make the script work on a server that is out of memory.
-- The server refuses a script at its first write that needs memory, but not after a write that needs none.
-- Place it before the first write, in scripts that free memory or write very little.
-- KEYS[1]: any key that is a hash or missing

redis.call('HDEL', KEYS[1], '')
