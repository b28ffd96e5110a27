-- KEYS: a worker's experiences, counts, epochs, dead and again
-- ARGV: fields of counts and of epochs, number of batches that waited
-- Gives 1, or 0 where somebody has used the queue meanwhile.

-- include: ops/lua/unchanged.lua

if not same(KEYS[2]) or not same(KEYS[3]) then return 0 end
local length = redis.pcall('XLEN', KEYS[1])
if type(length) == 'table' then length = -1 end
if length ~= tonumber(ARGV[at]) then return 0 end
for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
return 1
