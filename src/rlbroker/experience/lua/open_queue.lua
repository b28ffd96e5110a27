-- Create a worker's queue if it does not exist, and fence older incarnations.
-- KEYS: the worker's experiences, its counts
-- ARGV: incarnation, group, number of the last batch that this incarnation has stored; a higher number than any batch
--       has, if it does not know how many bytes the queue has
-- Reply: the number of this incarnation's last batch that is or was in the stream, and the bytes that were ever sent;
--        -1 for the latter if the server lost nothing, so that the worker's own number is right
-- Errors: FENCED if a newer incarnation has joined

local own = tonumber(ARGV[1])
local known = tonumber(redis.call('HGET', KEYS[2], 'incarnation') or '0') or 0
if redis.call('EXISTS', KEYS[1]) == 0 or #redis.call('XINFO', 'GROUPS', KEYS[1]) == 0 then
  redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[2], '0', 'MKSTREAM')
end
local incarnation, last = 0, 0
local info = redis.call('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then
    local found_incarnation, found_last = string.match(info[i + 1], '^(%d+)-(%d+)$')
    incarnation, last = tonumber(found_incarnation), tonumber(found_last)
  end
end
if known > own or incarnation > own then
  return redis.error_reply('FENCED a newer process has this worker id')
end
if known < own then
  if known > 0 and incarnation == known then
    -- The previous incarnation may have died without writing how many it sent.
    local sent = tonumber(redis.call('HGET', KEYS[2], 'sent:' .. known) or '0') or 0
    redis.call('HSET', KEYS[2], 'sent:' .. known, string.format('%.0f', math.max(sent, last)))
  end
  redis.call('HSET', KEYS[2], 'incarnation', ARGV[1])
  -- The counts of all incarnations before the previous one are added up in one field. The previous one may still count.
  local counts = redis.call('HGETALL', KEYS[2])
  for i = 1, #counts, 2 do
    local reason, counted_by = string.match(counts[i], '^([%a_]+):(%d+)$')
    if reason and tonumber(counted_by) < known then
      redis.call('HSET', KEYS[2], reason,
        (tonumber(redis.call('HGET', KEYS[2], reason) or '0') or 0) + (tonumber(counts[i + 1]) or 0))
      redis.call('HDEL', KEYS[2], counts[i])
    end
  end
end
if incarnation < own then
  -- From now on the server refuses entries of older incarnations: their ids are smaller than the last one.
  redis.call('XDEL', KEYS[1], redis.call('XADD', KEYS[1], ARGV[1] .. '-0', 'incarnation', ARGV[1]))
  last = 0
end
if known == own and last >= tonumber(ARGV[3]) then
  return {last, -1}
end
-- Bytes that were ever sent: those that were removed, and those in the stream.
local total = tonumber(redis.call('HGET', KEYS[2], 'removed_bytes') or '0') or 0
local position = '-'
while true do
  local entry = redis.call('XRANGE', KEYS[1], position, '+', 'COUNT', 1)[1]
  if not entry then break end
  for i = 1, #entry[2], 2 do
    if entry[2][i] == 'stored_bytes' then total = total + (tonumber(entry[2][i + 1]) or 0) end
  end
  position = '(' .. entry[1]
end
return {last, total}
