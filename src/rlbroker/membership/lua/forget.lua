-- End the membership of a silent worker.
-- KEYS: the worker's life, its acknowledgements, weights, meta
-- ARGV: the minimum silence in milliseconds; the `seen` time that the worker must still have, 0 for any
-- Reply: 1 if the worker was forgotten, 0 if it was not silent for that long or is not a member

-- include: membership/lua/announce.lua
-- include: membership/lua/next_incarnation.lua
-- include: membership/lua/silent_since.lua

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local since = silent_since(KEYS[1], KEYS[4])
if not since or now - since < tonumber(ARGV[1]) then
  return 0
end
if ARGV[2] ~= '0' and redis.call('HGET', KEYS[1], 'seen') ~= ARGV[2] then
  return 0
end
-- The old incarnation is fenced: a worker that returns has to register again.
local incarnation = next_incarnation(redis.call('HGET', KEYS[1], 'incarnation'))
redis.call('HSET', KEYS[1], 'incarnation', incarnation, 'member', '0')
local latest = redis.call('HGET', KEYS[3], 'version') or '0'
announce(KEYS[2], incarnation, 'gone', latest)
return 1
