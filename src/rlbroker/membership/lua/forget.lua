-- KEYS: the worker's life, its acknowledgements, weights, meta
-- ARGV: milliseconds of silence after which it is gone, when it was seen last if that is to be still so; 0 for any

-- include: membership/lua/announce.lua
-- include: membership/lua/next_incarnation.lua
-- include: membership/lua/silent_since.lua

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local silent_since = heard_of(KEYS[1], KEYS[4])
if not silent_since or now - silent_since < tonumber(ARGV[1]) then
  return 0
end
if ARGV[2] ~= '0' and redis.call('HGET', KEYS[1], 'seen') ~= ARGV[2] then
  return 0
end
-- Should it come back, it has to register again: its incarnation is over.
local incarnation = next_incarnation(redis.call('HGET', KEYS[1], 'incarnation'))
redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'member', '0')
local latest = redis.call('HGET', KEYS[3], 'version') or '0'
announce(KEYS[2], incarnation, 'gone', latest)
return 1
