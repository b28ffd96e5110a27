-- KEYS: meta, workers, control, pending, outcomes of this command, then the life of each worker that it is for
-- ARGV: epoch, command id, seconds to keep the outcomes, how many workers there ever were (-1 for any number),
--       these workers in order and their incarnations, then the incarnations of others, whose lives follow in KEYS
--       and who are no members, all separated by commas; then field and value pairs
-- Gives 'changed' where one of them is not a member in this life any more, or another one has come.

-- include: backend/lua/leader_only.lua

if redis.call('EXISTS', KEYS[5]) == 1 then return 'sent' end  -- before; the reply was lost
if tonumber(ARGV[4]) >= 0 and redis.call('SCARD', KEYS[2]) ~= tonumber(ARGV[4]) then return 'changed' end
local workers, lives = {}, {}
for worker in string.gmatch(ARGV[5], '%d+') do table.insert(workers, worker) end
for life in string.gmatch(ARGV[6], '%d+') do table.insert(lives, life) end
for i, life in ipairs(lives) do
  local there = redis.pcall('HMGET', KEYS[5 + i], 'incarnation', 'member')
  if there['err'] or there[1] ~= life or there[2] ~= '1' then return 'changed' end
end
local place = 5 + #lives
for life in string.gmatch(ARGV[7], '%d+') do
  place = place + 1
  local there = redis.pcall('HMGET', KEYS[place], 'incarnation', 'member')
  if there['err'] or there[1] ~= life or there[2] == '1' then return 'changed' end
end
if #workers == 0 then return 'sent' end
local entry = redis.call('XADD', KEYS[3], '*', 'event', 'command', 'command', ARGV[2],
  'workers', ARGV[5], 'incarnations', ARGV[6], unpack(ARGV, 8))
for i, worker in ipairs(workers) do
  redis.call('HSET', KEYS[5], worker, 'waiting')
  redis.call('HSET', KEYS[4], ARGV[2] .. ':' .. worker, lives[i] .. ' ' .. entry)
end
redis.call('EXPIRE', KEYS[5], ARGV[3])
return 'sent'
