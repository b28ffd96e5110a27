-- Settle one event of a worker: remove it, and write its effects in the same step.
-- KEYS: meta, the worker's acknowledgements, its ledger, missed, pending, then outcomes of commands
-- ARGV: the learner's epoch, id of the event, number of writes, then for each write: the place of its key in KEYS, the
--       number of its arguments, the command, and the arguments
-- Reply: 1 if the event was settled now, 0 if it was settled before
-- Errors: FENCED, LOST; ERR for a command that is not allowed

-- include: backend/lua/leader_only.lua

if redis.call('XDEL', KEYS[2], ARGV[2]) == 0 then
  return 0
end
-- Workers can call this script too, with their own rights: it must not run expensive commands for them.
local allowed = {HSET = true, HDEL = true, XADD = true, EXPIRE = true}
local at = 4
for _ = 1, tonumber(ARGV[3]) do
  local count = tonumber(ARGV[at + 1])
  if not allowed[ARGV[at + 2]] then return redis.error_reply('ERR no such write: ' .. ARGV[at + 2]) end
  redis.call(ARGV[at + 2], KEYS[tonumber(ARGV[at])], unpack(ARGV, at + 3, at + 2 + count))
  at = at + 3 + count
end
return 1
