-- Acknowledges, deletes and counts entries of one stream.
-- KEYS: as in own_entries.lua
-- ARGV: as in own_entries.lua; then for each entry: id, stored bytes, outcome
-- Reply: how many entries were still there, then the ids of those that another learner has now.

-- include: experience/lua/own_entries.lua

local reply, incarnation, last = {0}, '', -1
-- One read finds all pending entries of this learner, unless other learners have some in between.
local number_of = (#ARGV - 3) / 3
local pending = {}
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[4], ARGV[#ARGV - 2], number_of, ARGV[2])) do
  pending[row[1]] = true
end
local done, bytes, outcomes = {}, 0, {}
for i = 4, #ARGV, 3 do
  local owned = pending[ARGV[i]] or owns(ARGV[i])
  if owned then
    table.insert(done, ARGV[i])
    bytes = bytes + tonumber(ARGV[i + 1])
    outcomes[ARGV[i + 2]] = (outcomes[ARGV[i + 2]] or 0) + 1
  elseif owned == false then
    table.insert(reply, ARGV[i])
  end
  local of, number = string.match(ARGV[i], '^(%d+)-(%d+)$')
  if of ~= incarnation then incarnation, last = of, -1 end
  last = math.max(last, tonumber(number))
end
for from = 1, #done, 1000 do  -- Lua cannot pass more than some thousand arguments
  local to = math.min(from + 999, #done)
  redis.call('XACK', KEYS[1], ARGV[1], unpack(done, from, to))
  redis.call('XDEL', KEYS[1], unpack(done, from, to))
end
reply[1] = #done
if #done > 0 then count('removed_bytes', string.format('%.0f', bytes)) end
for outcome, times in pairs(outcomes) do count(outcome, times) end
-- What was acknowledged was sent, and the worker writes only now and then how many it sent. The ids of retried batches
-- belong to no incarnation, so there is no such field for them.
local sent = redis.call('HGET', KEYS[2], 'sent:' .. incarnation)
if sent and (tonumber(sent) or 0) < last then  -- a worker may write anything here
  redis.call('HSET', KEYS[2], 'sent:' .. incarnation, string.format('%.0f', last))
end
return reply
