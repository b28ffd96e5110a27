-- Add an acknowledgement to a worker's stream, if the stream still ends with the entry that the worker added last. After
-- a loss another process with the same worker id may create the stream again; an acknowledgement must not be added to it
-- before those that were lost, because the ledger reads them in order.
-- KEYS: the worker's acknowledgements
-- ARGV: id of the entry that the stream must end with, empty to open the stream; id of the new entry; field and value
--       pairs
-- Reply: id of the last entry of the stream, also if that was deleted; to open a stream that has come further changes
--        nothing
-- Errors: LOST if the stream ends with another entry

local last = '0-0'
local info = redis.pcall('XINFO', 'STREAM', KEYS[1])
for i = 1, #info, 2 do
  if info[i] == 'last-generated-id' then last = info[i + 1] end
end
if last == ARGV[2] then return last end  -- a retry: the first reply was lost
if ARGV[1] == '' then
  local added = redis.pcall('XADD', KEYS[1], ARGV[2], unpack(ARGV, 3))
  return type(added) == 'string' and added or last
elseif last ~= ARGV[1] then
  return redis.error_reply('LOST the server has lost acknowledgements of a worker')
end
return redis.call('XADD', KEYS[1], ARGV[2], unpack(ARGV, 3))
