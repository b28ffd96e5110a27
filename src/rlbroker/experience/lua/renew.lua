-- Renew a learner's claim on its pending entries. Entries that another learner has taken over stay with that learner.
-- KEYS: a stream
-- ARGV: group, a consumer
-- Reply: how many entries were renewed

local position, renewed = '-', 0
while true do
  local rows = redis.pcall('XPENDING', KEYS[1], ARGV[1], position, '+', 100, ARGV[2])
  if rows['err'] or #rows == 0 then return renewed end  -- an error: the stream is missing or has another type
  for _, row in ipairs(rows) do
    redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, row[1], 'RETRYCOUNT', row[4], 'JUSTID')
    position = '(' .. row[1]  -- as text: the number may be too large for Lua
    renewed = renewed + 1
  end
end
