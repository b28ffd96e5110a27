-- Acknowledge, delete and count entries of one stream.
-- KEYS: as in own_entries.lua
-- ARGV: as in own_entries.lua; then for each entry: id, stored bytes, outcome
-- Reply: how many entries this learner still had, then the ids of those that another learner has now
-- Errors: as in own_entries.lua

-- include: experience/lua/own_entries.lua

local reply, incarnation, last = {0}, '', -1
-- One read finds most of the entries. `owns` finds the rest: those taken over, and those after other pending entries.
local entry_count = (#ARGV - 3) / 3
local pending = {}
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[4], ARGV[#ARGV - 2], entry_count, ARGV[2])) do
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
  local entry_incarnation, number = string.match(ARGV[i], '^(%d+)-(%d+)$')
  if entry_incarnation ~= incarnation then incarnation, last = entry_incarnation, -1 end
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
-- An acknowledged batch was sent, but the worker updates `sent` only occasionally. The ids of retried batches belong to
-- no incarnation, so they have no such field.
local sent = redis.call('HGET', KEYS[2], 'sent:' .. incarnation)
if sent and (tonumber(sent) or 0) < last then  -- a worker may write anything here
  redis.call('HSET', KEYS[2], 'sent:' .. incarnation, string.format('%.0f', last))
end
return reply
