-- Function: return the number of a new incarnation, or of a new learner's epoch: the server's time in milliseconds, or
-- one more than the last number if that is larger. A plain counter would restart on a server that lost its data and
-- reuse numbers: entries of a new process would then be taken for entries that were delivered before. A last number
-- that no clock can have produced was forged by a worker and is ignored.

local function next_incarnation(last)
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local before = tonumber(last) or 0
  if not (before < 2 * now) then before = 0 end
  return string.format('%.0f', math.max(before + 1, now))
end
