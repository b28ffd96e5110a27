-- Delete a dead letter.
-- KEYS: the worker's dead letters, its counts
-- ARGV: id
-- Reply: 1; 0 if it did not exist

local entry = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])[1]
if not entry then return 0 end
local size = 0
for i = 1, #entry[2] do size = size + #entry[2][i] end
redis.call('XDEL', KEYS[1], ARGV[1])
redis.pcall('HINCRBY', KEYS[2], 'dead_bytes', -size)  -- a worker may have written something that is not a number
return 1
