-- Queue a dead letter to be delivered again.
-- KEYS: the worker's dead letters, its stream of retried batches, its counts
-- ARGV: group, id, reason under which it was counted
-- Reply: 1; 0 if it did not exist

local entry = redis.call('XRANGE', KEYS[1], ARGV[2], ARGV[2])[1]
if not entry then return 0 end
if redis.call('EXISTS', KEYS[2]) == 0 then
  redis.call('XGROUP', 'CREATE', KEYS[2], ARGV[1], '0', 'MKSTREAM')
end
redis.call('XADD', KEYS[2], '*', unpack(entry[2]))
redis.call('XDEL', KEYS[1], ARGV[2])
local size = 0
for i = 1, #entry[2] do size = size + #entry[2][i] end
-- A worker may write anything here: a field that is not a number stays as it is.
redis.pcall('HINCRBY', KEYS[3], 'dead_bytes', -size)
redis.pcall('HINCRBY', KEYS[3], 'retried_' .. ARGV[3], 1)
return 1
