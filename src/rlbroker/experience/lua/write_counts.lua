-- KEYS: the worker's counts
-- ARGV: incarnation, then field and value pairs: what this life says of itself, in absolute numbers

local newest = tonumber(redis.call('HGET', KEYS[1], 'incarnation') or '0') or 0
if newest > tonumber(ARGV[1]) and redis.call('HEXISTS', KEYS[1], 'sent:' .. ARGV[1]) == 0 then
  return 0  -- it was replaced more than once, and what it said is in the sums of all lives
end
for i = 2, #ARGV, 2 do
  -- What the server itself counted may be more than the worker heard of.
  local counted = string.match(ARGV[i], '^dropped_oldest:') and redis.call('HGET', KEYS[1], ARGV[i])
  if not counted or tonumber(counted) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return 1
