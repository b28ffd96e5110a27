-- Move an entry that no learner can use to the dead letters, count it, and delete the oldest dead letters.
-- KEYS: as in own_entries.lua; then the worker's dead letters
-- ARGV: as in own_entries.lua; then id, stored bytes, reason, letters to keep, bytes to keep,
--       field and value pairs to add
-- Reply: 1; 0 if the entry is not pending; 2 if another learner has it now
-- Errors: as in own_entries.lua

-- include: experience/lua/own_entries.lua

local owned = owns(ARGV[4])
if not owned then return owned == false and 2 or 0 end
local entry = redis.call('XRANGE', KEYS[1], ARGV[4], ARGV[4])[1]
redis.call('XACK', KEYS[1], ARGV[1], ARGV[4])
redis.call('XDEL', KEYS[1], ARGV[4])
count(ARGV[6], 1)
count('removed_bytes', ARGV[5])
if not entry then return 1 end
local function size(fields)
  local sum = 0
  for i = 1, #fields do sum = sum + #fields[i] end
  return sum
end
local fields = {unpack(entry[2], 1, 1000)}  -- a worker may have sent more fields than Lua can pass
for i = 9, #ARGV do table.insert(fields, ARGV[i]) end
local added = redis.pcall('XADD', KEYS[4], '*', unpack(fields))
if type(added) == 'table' and added['err'] then return 1 end  -- there is no room for it, but it is counted
count('dead_bytes', size(fields))
while redis.call('XLEN', KEYS[4]) > tonumber(ARGV[7])
  or (redis.call('XLEN', KEYS[4]) > 0
    and (tonumber(redis.call('HGET', KEYS[2], 'dead_bytes')) or 0) > tonumber(ARGV[8])) do
  local oldest = redis.call('XRANGE', KEYS[4], '-', '+', 'COUNT', 1)[1]
  redis.call('XDEL', KEYS[4], oldest[1])
  count('dead_bytes', -size(oldest[2]))
end
return 1
