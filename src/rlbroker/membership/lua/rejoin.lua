-- Write back the membership of a living worker that the server may have lost. Its incarnation stays. Works on a full
-- server.
-- KEYS: the worker's life, workers, weights, its heartbeat
-- ARGV: worker id, incarnation, the newest version that the worker saw, token of its registration, lifetime of the
--       heartbeat in milliseconds, upload name of that version
-- Reply: 1
-- Errors: FENCED for an old incarnation

-- include: backend/lua/also_when_full.lua
-- include: membership/lua/only_newest.lua

local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('HSET', KEYS[1], 'incarnation', ARGV[2], 'member', '1', 'seen', now)
redis.call('HSET', KEYS[4], 'token', ARGV[4], 'incarnation', ARGV[2])
redis.call('PEXPIRE', KEYS[4], ARGV[5])
local manifest = redis.call('HMGET', KEYS[3], 'version', 'upload')
local latest = tonumber(manifest[1] or '0') or 0
local seen = tonumber(ARGV[3])
-- Report to the learner which version numbers were used. If the latest number was reused for another upload, the
-- learner must publish above it.
if seen > 0 and seen == latest and manifest[2] ~= ARGV[6] then seen = seen + 1 end
if seen > latest then
  redis.call('HSET', KEYS[1], 'known_version', string.format('%.0f', seen))
end
return 1
