-- Deletes the queue of one worker, if it has not changed since it was read.
-- KEYS: the worker's experiences, counts, epochs, dead and again
-- ARGV: fields of counts and of epochs (see unchanged.lua), number of entries in experiences
-- Reply: 1, or 0 if the queue has changed

-- include: ops/lua/unchanged.lua

if not same(KEYS[2]) or not same(KEYS[3]) then return 0 end
local length = redis.pcall('XLEN', KEYS[1])
if type(length) == 'table' then length = -1 end
if length ~= tonumber(ARGV[at]) then return 0 end
for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
return 1
