-- KEYS: meta, a worker's acknowledgements, its ledger, missed, pending, then outcomes of commands
-- ARGV: the learner's epoch, id of the event, number of writes,
--       then for each write: place of its key in KEYS, number of arguments, command, arguments

-- include: backend/lua/leader_only.lua

if redis.call('XDEL', KEYS[2], ARGV[2]) == 0 then
  return 0  -- settled before
end
-- Workers can call scripts too, with rights of their own: no more than these may come of it.
local allowed = {HSET = true, HDEL = true, XADD = true, EXPIRE = true}
local at = 4
for _ = 1, tonumber(ARGV[3]) do
  local count = tonumber(ARGV[at + 1])
  if not allowed[ARGV[at + 2]] then return redis.error_reply('ERR no such write: ' .. ARGV[at + 2]) end
  redis.call(ARGV[at + 2], KEYS[tonumber(ARGV[at])], unpack(ARGV, at + 3, at + 2 + count))
  at = at + 3 + count
end
return 1
