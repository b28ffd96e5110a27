-- Write the counts of an incarnation of a worker, in absolute numbers.
-- KEYS: the worker's counts
-- ARGV: incarnation, then field and value pairs
-- Reply: 1; 0 if its counts were already added to the sums over all incarnations

local newest = tonumber(redis.call('HGET', KEYS[1], 'incarnation') or '0') or 0
if newest > tonumber(ARGV[1]) and redis.call('HEXISTS', KEYS[1], 'sent:' .. ARGV[1]) == 0 then
  return 0  -- it was replaced more than once
end
for i = 2, #ARGV, 2 do
  -- drop_oldest.lua counted these, and the worker may not have received the reply.
  local counted = string.match(ARGV[i], '^dropped_oldest:') and redis.call('HGET', KEYS[1], ARGV[i])
  if not counted or tonumber(counted) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return 1
