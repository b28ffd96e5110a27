-- Deletes the keys of a run, or of one worker's queue, if the compared ones have not changed since they were read.
-- KEYS: the compared keys, of a run with meta first, then the others
-- ARGV: number of compared keys, their fingerprint, name of the mark to leave in meta (empty for a queue)
-- Reply: 1, or 0 if a compared key has changed

-- include: ops/lua/fingerprint.lua

if fingerprint() ~= ARGV[2] then return 0 end
for _, key in ipairs(KEYS) do redis.call('UNLINK', key) end
if ARGV[3] ~= '' then redis.call('HSET', KEYS[1], 'ended', '0 0', ARGV[3], '1') end
return 1
