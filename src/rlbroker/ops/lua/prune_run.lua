-- Deletes the keys of a run and leaves a mark in meta, if the run has not changed since it was read.
-- KEYS: workers, meta, the incarnations of the known workers, then the run's other keys
-- ARGV: number of incarnations, fields of meta and of each incarnation (see unchanged.lua), number of workers,
--       name of the mark
-- Reply: 1, or 0 if the run has changed

-- include: ops/lua/unchanged.lua

at = 2
for i = 2, 2 + tonumber(ARGV[1]) do
  if not same(KEYS[i]) then return 0 end
end
local count = redis.pcall('SCARD', KEYS[1])
if type(count) == 'table' then count = -1 end
if count ~= tonumber(ARGV[at]) then return 0 end
for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
redis.call('HSET', KEYS[2], 'ended', '0', ARGV[at + 1], '1')
return 1
