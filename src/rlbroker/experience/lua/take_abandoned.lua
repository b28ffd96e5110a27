-- Take over entries that other learners abandoned.
-- KEYS: as in own_entries.lua
-- ARGV: as in own_entries.lua; then the least idle time of an entry in milliseconds, ids
-- Reply: the ids that were taken over
-- Errors: as in own_entries.lua

-- include: experience/lua/own_entries.lua

local taken = {}
for i = 5, #ARGV do
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)[1]
  if row and not owns(ARGV[i]) and row[3] >= tonumber(ARGV[4]) then
    -- The number of deliveries stays: count_delivery.lua adds one when the entry is delivered.
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2] .. '+', 0, ARGV[i], 'RETRYCOUNT', row[4], 'JUSTID')
    if owns(ARGV[i]) == nil then
      count('trimmed', 1)  -- the entry was deleted while it was pending
    else
      table.insert(taken, ARGV[i])
    end
  end
end
return taken
