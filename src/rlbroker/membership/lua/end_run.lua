-- Record that the run has ended: its workers stop, also those that join later, until a learner opens the run again. The
-- end has the epoch of the learner, and is void under another one. Works on a full server.
-- KEYS: meta
-- ARGV: the learner's epoch; its signature of the end, empty for none; `learner`, or `command` for another process
-- Reply: 1
-- Errors: FENCED, LOST

-- include: backend/lua/leader_only.lua
-- include: backend/lua/also_when_full.lua

-- A repeated end keeps its time. One with a signature replaces all others, as only it is believed in a signed run.
local epoch, signature = string.match(redis.call('HGET', KEYS[1], 'ended') or '', '^%S+ (%d+) ?(.*)$')
if epoch ~= ARGV[1] or (signature ~= ARGV[2] and ARGV[2] ~= '') then
  local time = redis.call('TIME')
  local ended = string.format('%.3f', time[1] + time[2] / 1000000) .. ' ' .. ARGV[1]
  if ARGV[2] ~= '' then ended = ended .. ' ' .. ARGV[2] end
  redis.call('HSET', KEYS[1], 'ended', ended, 'ended_by', ARGV[3])
elseif ARGV[3] == 'learner' then
  redis.call('HSET', KEYS[1], 'ended_by', 'learner')
end
return 1
