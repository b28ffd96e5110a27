-- KEYS: the worker's life, workers, its acknowledgements, weights, its heartbeat
-- ARGV: worker id, incarnation, newest version that the worker knows, token of its registration,
--       lifetime of the heartbeat in milliseconds, name of the upload of that version
-- For a worker that lives on after the server may have lost it. Its incarnation stays.

-- include: membership/lua/announce.lua
-- include: backend/lua/also_when_full.lua
-- include: membership/lua/only_newest.lua

local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[1], 'incarnation', ARGV[2], 'member', '1', 'seen', now)
redis.call('HSET', KEYS[5], 'token', ARGV[4], 'incarnation', ARGV[2])
redis.call('PEXPIRE', KEYS[5], ARGV[5])
local pointer = redis.call('HMGET', KEYS[4], 'version', 'upload')
local latest = tonumber(pointer[1] or '0') or 0
local known = tonumber(ARGV[3])
-- For the learner: these numbers were used. One that was given to something else must not be the latest any more.
if known > 0 and known == latest and pointer[2] ~= ARGV[6] then known = known + 1 end
if known > latest then
  redis.call('HSET', KEYS[1], 'known_version', string.format('%.0f', known))
end
if redis.call('EXISTS', KEYS[3]) == 0 then
  announce(KEYS[3], ARGV[2], 'joined', math.max(latest, known))
end
return 1
