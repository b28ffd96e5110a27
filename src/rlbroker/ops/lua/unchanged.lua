-- Defines same(key): whether a hash still has the fields that were read before.
-- ARGV: for each hash, in the order of the calls: the number of its fields (-1 for a key that is not a hash), then
-- its names and values. `at` is the position of the next argument.

local at = 1
local function same(key)
  local count = tonumber(ARGV[at])
  local first = at + 1
  at = at + 1 + 2 * math.max(count, 0)
  local length = redis.pcall('HLEN', key)
  if type(length) == 'table' then length = -1 end  -- not a hash, as when it was read
  if length ~= count then return false end
  for i = first, at - 1, 2 do
    if redis.call('HGET', key, ARGV[i]) ~= ARGV[i + 1] then return false end
  end
  return true
end
