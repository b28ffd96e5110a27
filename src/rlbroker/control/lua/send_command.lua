-- Put a command onto the control stream, if its workers are still the members that the learner read.
-- KEYS: meta, workers, control, pending, outcomes of this command, the life of each worker that it is for, then the
--       life of each former member
-- ARGV: epoch, command id, lifetime of the outcomes in seconds, expected size of `workers` (-1 for any), ids of the
--       workers, their incarnations, incarnations of the former members, ids of wanted workers that are not members (each
--       of the four a list separated by commas), the outcome at these, then field and value pairs
-- Reply: 'sent', also for a retry or without workers; 'changed' if a worker is no longer a member with this
--        incarnation, or if another one has joined
-- Errors: FENCED, LOST

-- include: backend/lua/leader_only.lua

if redis.call('EXISTS', KEYS[5]) == 1 then return 'sent' end  -- a retry: the first reply was lost
if tonumber(ARGV[4]) >= 0 and redis.call('SCARD', KEYS[2]) ~= tonumber(ARGV[4]) then return 'changed' end
local workers, incarnations = {}, {}
for worker in string.gmatch(ARGV[5], '%d+') do table.insert(workers, worker) end
for incarnation in string.gmatch(ARGV[6], '%d+') do table.insert(incarnations, incarnation) end
for i, incarnation in ipairs(incarnations) do
  local stored = redis.pcall('HMGET', KEYS[5 + i], 'incarnation', 'member')
  if stored['err'] or stored[1] ~= incarnation or stored[2] ~= '1' then return 'changed' end
end
local place = 5 + #incarnations
for incarnation in string.gmatch(ARGV[7], '%d+') do
  place = place + 1
  local stored = redis.pcall('HMGET', KEYS[place], 'incarnation', 'member')
  if stored['err'] or stored[1] ~= incarnation or stored[2] == '1' then return 'changed' end
end
if #workers == 0 then return 'sent' end
local entry = redis.call('XADD', KEYS[3], '*', 'event', 'command', 'command', ARGV[2],
  'workers', ARGV[5], 'incarnations', ARGV[6], unpack(ARGV, 10))
for i, worker in ipairs(workers) do
  redis.call('HSET', KEYS[5], worker, 'waiting')
  redis.call('HSET', KEYS[4], ARGV[2] .. ':' .. worker, incarnations[i] .. ' ' .. entry)
end
for worker in string.gmatch(ARGV[8], '%d+') do redis.call('HSET', KEYS[5], worker, ARGV[9]) end
redis.call('EXPIRE', KEYS[5], ARGV[3])
return 'sent'
