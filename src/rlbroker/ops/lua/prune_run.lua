-- KEYS: workers, meta, the lives of workers that are known, then the run's other keys
-- ARGV: number of lives, fields of meta and of each life, number of workers, name of the mark
-- Gives 1, or 0 where somebody has used the run meanwhile.

-- include: ops/lua/unchanged.lua

at = 2
for i = 2, 2 + tonumber(ARGV[1]) do
  if not same(KEYS[i]) then return 0 end
end
local count = redis.pcall('SCARD', KEYS[1])
if type(count) == 'table' then count = -1 end
if count ~= tonumber(ARGV[at]) then return 0 end
for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
redis.call('HSET', KEYS[2], 'learner_state', 'ended', ARGV[at + 1], '1')
return 1
