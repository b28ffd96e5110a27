-- Make a stored version the latest: write the manifest, add a notice to the control stream, and announce the version.
-- A repeated call, after a lost reply, changes nothing.
-- KEYS: meta, weights, control, notify channel
-- ARGV: epoch, version, upload, upload and version of a manifest that is refused and may be replaced,
--       then field and value pairs of the manifest
-- Reply: `committed`, or `taken` if the version number was used before
-- Errors: as in leader_only.lua

-- include: backend/lua/leader_only.lua

local latest = redis.call('HMGET', KEYS[2], 'upload', 'version')
if (latest[1] or '') == ARGV[4] and (latest[2] or '') == ARGV[5] then latest = {} end
if latest[1] == ARGV[3] then
  return 'committed'  -- by an earlier call whose reply was lost
end
-- Versions that workers saw before the server lost them, and that an earlier call committed after all.
local floor = tonumber(redis.call('HGET', KEYS[1], 'version_floor') or '0') or 0
if math.max(floor, tonumber(latest[2] or '0') or math.huge) >= tonumber(ARGV[2]) then
  return 'taken'
end
redis.call('HSET', KEYS[2], unpack(ARGV, 6))
redis.call('XADD', KEYS[3], '*', 'event', 'version', 'version', ARGV[2])
redis.call('PUBLISH', KEYS[4], ARGV[2])
return 'committed'
