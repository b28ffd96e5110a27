-- further ARGV: for each entry: id, stored bytes, what became of it
-- Gives how many were there, then the ids of those that are another learner's now.

-- include: experience/lua/own_entries.lua

local reply, life, last = {0}, '', -1
-- One look finds all that is ours, where nobody else has any of it.
local number_of = (#ARGV - 3) / 3
local ours = {}
for _, row in ipairs(redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[4], ARGV[#ARGV - 2], number_of, ARGV[2])) do
  ours[row[1]] = true
end
local done, bytes, reasons = {}, 0, {}
for i = 4, #ARGV, 3 do
  local has = ours[ARGV[i]] or mine(ARGV[i])
  if has then
    table.insert(done, ARGV[i])
    bytes = bytes + tonumber(ARGV[i + 1])
    reasons[ARGV[i + 2]] = (reasons[ARGV[i + 2]] or 0) + 1
  elseif has == false then
    table.insert(reply, ARGV[i])
  end
  local of, number = string.match(ARGV[i], '^(%d+)-(%d+)$')
  if of ~= life then life, last = of, -1 end
  last = math.max(last, tonumber(number))
end
for from = 1, #done, 1000 do  -- Lua passes no more than some thousand arguments
  local to = math.min(from + 999, #done)
  redis.call('XACK', KEYS[1], ARGV[1], unpack(done, from, to))
  redis.call('XDEL', KEYS[1], unpack(done, from, to))
end
reply[1] = #done
if #done > 0 then count('removed_bytes', string.format('%.0f', bytes)) end
for reason, times in pairs(reasons) do count(reason, times) end
-- What was delivered was sent: the worker says how much only now and then. (Not for the stream of retries.)
local said = redis.call('HGET', KEYS[2], 'sent:' .. life)
if said and (tonumber(said) or 0) < last then  -- the worker can write here too
  redis.call('HSET', KEYS[2], 'sent:' .. life, string.format('%.0f', last))
end
return reply
