-- further ARGV: milliseconds for which an entry must have been idle, then ids

-- include: experience/lua/own_entries.lua

local taken = {}
for i = 5, #ARGV do
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1)[1]
  if row and not mine(ARGV[i]) and row[3] >= tonumber(ARGV[4]) then
    -- Its number of deliveries stays: it counts one more when it is handed out.
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2] .. '+', 0, ARGV[i], 'RETRYCOUNT', row[4], 'JUSTID')
    if mine(ARGV[i]) == nil then
      count('trimmed', 1)  -- somebody deleted it, and the server noticed just now
    else
      table.insert(taken, ARGV[i])
    end
  end
end
return taken
