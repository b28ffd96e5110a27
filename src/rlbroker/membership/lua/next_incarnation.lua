-- Gives the number of a new life: an incarnation, or a learner's epoch. It is the time in milliseconds, or one
-- more than the last number. A server that came back empty does not know the last one; a plain counter would
-- give numbers that were used before, and what a new process sends would be taken for what was delivered already.
-- A last number that no clock can have given is nonsense that a worker wrote.

local function next_incarnation(last)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local before = tonumber(last) or 0
  if not (before < 2 * now) then before = 0 end
  return string.format('%.0f', math.max(before + 1, now))
end
