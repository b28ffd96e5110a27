-- Record a worker's heartbeat. Works on a full server.
-- KEYS: the worker's life, workers, its heartbeat, meta
-- ARGV: worker id, incarnation, token of its registration, lifetime of the heartbeat in milliseconds, its process as
--       host:pid, then field and value pairs
-- Reply: the fields of `meta` that a worker needs, in the order of META_FIELDS in joined_run.py
-- Errors: FENCED for an old incarnation; LOST if the server lost any part of the registration

-- include: membership/lua/note_fenced.lua

local stored = redis.call('HGET', KEYS[1], 'incarnation')
if (tonumber(stored or '0') or 0) > tonumber(ARGV[2]) then
  note_fenced(KEYS[1], KEYS[3], stored, ARGV[5])
end

-- include: backend/lua/also_when_full.lua
-- include: membership/lua/only_newest.lua

-- After a loss the learner writes the members back, but not their tokens. A missing token tells the worker that it has
-- to write back the rest itself.
local known = redis.call('HGET', KEYS[3], 'token') == ARGV[3]
local member = redis.call('HGET', KEYS[1], 'member') == '1' and redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 1
if newest < tonumber(ARGV[2]) or not known or not member then
  return redis.error_reply('LOST the server has lost worker ' .. ARGV[1])
end
local time = redis.call('TIME')
redis.call('HSET', KEYS[1], 'seen', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
redis.call('HSET', KEYS[3], 'incarnation', ARGV[2], unpack(ARGV, 6))
redis.call('PEXPIRE', KEYS[3], ARGV[4])
return redis.call('HMGET', KEYS[4], 'wire_format', 'shards', 'epoch', 'ended', 'members', 'hosts',
  'max_queue_size', 'max_queue_bytes', 'when_full', 'lease_seconds', 'forget_seconds')
