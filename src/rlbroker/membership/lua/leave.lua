-- End the membership of a worker that leaves.
-- KEYS: the worker's life, its heartbeat, its acknowledgements, weights
-- ARGV: incarnation, its process as host:pid
-- Reply: 1 if the worker left, 0 if this incarnation was no longer a member

-- include: membership/lua/next_incarnation.lua
-- include: membership/lua/note_fenced.lua

local newest = redis.call('HGET', KEYS[1], 'incarnation')
if (tonumber(newest or '0') or 0) > tonumber(ARGV[1]) then
  note_fenced(KEYS[1], KEYS[2], newest, ARGV[2])
end
if newest ~= ARGV[1] or redis.call('HGET', KEYS[1], 'member') ~= '1' then
  return 0
end
redis.call('DEL', KEYS[2])
redis.call('HSET', KEYS[1], 'incarnation', next_incarnation(ARGV[1]), 'member', '0')  -- fences this incarnation
-- The largest number that an acknowledgement of this incarnation can have, so that none follows it.
local latest = redis.call('HGET', KEYS[4], 'version') or '0'
redis.call('XADD', KEYS[3], ARGV[1] .. '-18446744073709551615', 'event', 'left', 'version', latest)
return 1
