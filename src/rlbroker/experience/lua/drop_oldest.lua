-- Drop the oldest waiting batches of a queue until it is within its bounds.
-- KEYS: the worker's experiences, its counts
-- ARGV: group, most waiting entries, most bytes in the queue, bytes that were ever sent, incarnation
-- Reply: how many batches this incarnation has dropped so far, the last id that was delivered, the first id that waits
-- Errors: FENCED if a newer incarnation has joined; LOST if the server lost the queue

local newest = tonumber(redis.call('HGET', KEYS[2], 'incarnation') or '0') or 0
if newest > tonumber(ARGV[5]) then
  return redis.error_reply('FENCED a newer process has this worker id')
elseif newest < tonumber(ARGV[5]) or redis.call('EXISTS', KEYS[1]) == 0 then
  return redis.error_reply('LOST the server lost the queue')
end
local function waiting()
  local pending = redis.call('XPENDING', KEYS[1], ARGV[1])[1]
  return redis.call('XLEN', KEYS[1]) - pending
end
local last_read = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
  local fields = {}
  for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
  if fields['name'] == ARGV[1] then last_read = fields['last-delivered-id'] end
end
local removed = tonumber(redis.call('HGET', KEYS[2], 'removed_bytes') or '0') or 0
local dropped = 0
local first = '18446744073709551615-18446744073709551615'
while true do
  -- Only entries after the last delivered one: a learner may already use those that it has read.
  local oldest = redis.call('XRANGE', KEYS[1], '(' .. last_read, '+', 'COUNT', 1)[1]
  if not oldest then break end
  first = oldest[1]
  if waiting() <= tonumber(ARGV[2]) and tonumber(ARGV[4]) - removed <= tonumber(ARGV[3]) then break end
  for i = 1, #oldest[2], 2 do
    if oldest[2][i] == 'stored_bytes' then removed = removed + tonumber(oldest[2][i + 1]) end
  end
  redis.call('XDEL', KEYS[1], oldest[1])
  dropped = dropped + 1
  first = '18446744073709551615-18446744073709551615'
end
redis.call('HSET', KEYS[2], 'removed_bytes', string.format('%.0f', removed))
return {redis.call('HINCRBY', KEYS[2], 'dropped_oldest:' .. ARGV[5], dropped), last_read, first}
