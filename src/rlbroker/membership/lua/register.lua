-- KEYS: the worker's life, workers, its acknowledgements, weights, control, meta, its heartbeat, its ledger
-- ARGV: worker id, lease in seconds where no learner has set one, '1' to take the id only if it is free,
--       a token of this attempt, wire format

-- include: membership/lua/announce.lua
-- include: membership/lua/next_incarnation.lua
-- include: membership/lua/silent_since.lua

local wire_format = redis.call('HGET', KEYS[6], 'wire_format') or ''
if wire_format ~= '' and wire_format ~= ARGV[5] then
  return {'incompatible', wire_format}  -- and the process that has this id goes on
end
local before = redis.call('HMGET', KEYS[7], 'token', 'incarnation', 'joined_version', 'joined_position')
if before[1] == ARGV[4] then  -- registered before; the reply was lost
  return {'registered', before[2], before[3], before[4]}
end
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local lease = tonumber(redis.call('HGET', KEYS[6], 'lease_seconds') or ARGV[2])
local silent_since = heard_of(KEYS[1], KEYS[6])
if ARGV[3] == '1' and silent_since then
  -- If the learner could not reach the server when the lease was over, the worker may not have reached it either.
  local over = silent_since + lease * 1000
  if now < over or tonumber(redis.call('HGET', KEYS[6], 'learner_seen') or '0') * 1000 < over then
    return {'taken'}
  end
end
-- What was settled may be of a later life than the hash says, if a process wrote nonsense into it.
local settled = string.match(redis.call('HGET', KEYS[8], 'event') or '', '^%d+') or '0'
local last_life = redis.call('HGET', KEYS[1], 'incarnation') or '0'
local incarnation = next_incarnation(math.max(tonumber(last_life) or 0, tonumber(settled)))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'member', '1', 'seen', string.format('%.0f', now))
local latest = redis.call('HGET', KEYS[4], 'version') or '0'
announce(KEYS[3], incarnation, 'joined', latest)
local last = redis.call('XREVRANGE', KEYS[5], '+', '-', 'COUNT', 1)
local position = last[1] and last[1][1] or '0-0'
redis.call('DEL', KEYS[7])
redis.call('HSET', KEYS[7], 'token', ARGV[4], 'incarnation', incarnation,
  'joined_version', latest, 'joined_position', position)
redis.call('PEXPIRE', KEYS[7], string.format('%.0f', lease * 10000))
return {'registered', incarnation, latest, position}
