-- Register a process as a worker and issue its incarnation.
-- KEYS: the worker's life, workers, its acknowledgements, weights, control, meta, its heartbeat, its ledger
-- ARGV: worker id, default lease in seconds, '1' to claim the id only if it is free, token of this attempt, wire format
-- Reply: 'registered', incarnation, latest version, last entry of the control stream;
--        or 'taken'; or 'incompatible' and the run's wire format

-- include: membership/lua/announce.lua
-- include: membership/lua/next_incarnation.lua
-- include: membership/lua/silent_since.lua

local wire_format = redis.call('HGET', KEYS[6], 'wire_format') or ''
if wire_format ~= '' and wire_format ~= ARGV[5] then
  return {'incompatible', wire_format}  -- before anything is written: the current worker must not be fenced
end
local before = redis.call('HMGET', KEYS[7], 'token', 'incarnation', 'joined_version', 'joined_position')
if before[1] == ARGV[4] then  -- a retry: this attempt succeeded and its reply was lost
  return {'registered', before[2], before[3], before[4]}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = tonumber(redis.call('HGET', KEYS[6], 'lease_seconds') or ARGV[2])
local since = silent_since(KEYS[1], KEYS[6])
if ARGV[3] == '1' and since then
  -- If the learner could not reach the server when the lease expired, the worker may have been cut off in the same way.
  local expires = since + lease * 1000
  if now < expires or tonumber(redis.call('HGET', KEYS[6], 'learner_seen') or '0') * 1000 < expires then
    return {'taken'}
  end
end
-- The ledger may have seen a later incarnation, if a process wrote an invalid one into the worker's life.
local settled = string.match(redis.call('HGET', KEYS[8], 'event') or '', '^%d+') or '0'
local last = redis.call('HGET', KEYS[1], 'incarnation') or '0'
local incarnation = next_incarnation(math.max(tonumber(last) or 0, tonumber(settled)))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'member', '1', 'seen', string.format('%.0f', now))
local latest = redis.call('HGET', KEYS[4], 'version') or '0'
announce(KEYS[3], incarnation, 'joined', latest)
local newest = redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1)
local position = newest[1] and newest[1][1] or '0-0'
redis.call('DEL', KEYS[7])
redis.call('HSET', KEYS[7], 'token', ARGV[4], 'incarnation', incarnation,
  'joined_version', latest, 'joined_position', position)
redis.call('PEXPIRE', KEYS[7], string.format('%.0f', lease * 10000))
return {'registered', incarnation, latest, position}
