-- KEYS: meta, weights, control, notify channel
-- ARGV: epoch, version, upload, upload and version of what somebody else wrote there and does not count,
--       then field and value pairs of the pointer

-- include: backend/lua/leader_only.lua

local latest = redis.call('HMGET', KEYS[2], 'upload', 'version')
if (latest[1] or '') == ARGV[4] and (latest[2] or '') == ARGV[5] then latest = {} end
if latest[1] == ARGV[3] then
  return 'committed'  -- before; the reply was lost
end
-- What workers saw on a server that lost it, and what an earlier try of ours came through with after all.
local floor = tonumber(redis.call('HGET', KEYS[1], 'version_floor') or '0') or 0
if math.max(floor, tonumber(latest[2] or '0') or math.huge) >= tonumber(ARGV[2]) then
  return 'taken'
end
redis.call('HSET', KEYS[2], unpack(ARGV, 6))
redis.call('XADD', KEYS[3], '*', 'event', 'version', 'version', ARGV[2])
redis.call('PUBLISH', KEYS[4], ARGV[2])
return 'committed'
