-- Compares hashes with what was read before; ARGV has the number of their fields, then names and values.

local at = 1
local function same(key)
  local count = tonumber(ARGV[at])
  local first = at + 1
  at = at + 1 + 2 * math.max(count, 0)
  local length = redis.pcall('HLEN', key)
  if type(length) == 'table' then length = -1 end  -- no hash, then and now
  if length ~= count then return false end
  for i = first, at - 1, 2 do
    if redis.call('HGET', key, ARGV[i]) ~= ARGV[i + 1] then return false end
  end
  return true
end
