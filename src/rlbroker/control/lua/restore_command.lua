-- Write back a command that the server may have lost: its outcomes, and, if it is pending, the command itself under the
-- same id.
-- KEYS: meta, control, pending, outcomes of this command
-- ARGV: epoch, command id, lifetime of the outcomes in seconds, number of workers, then id, incarnation and outcome of
--       each worker, then field and value pairs of the command
-- Reply: 1
-- Errors: FENCED if a newer learner publishes

if (tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0) > tonumber(ARGV[1]) then
  return redis.error_reply('FENCED a newer learner publishes in this run')
end
local lost = redis.call('EXISTS', KEYS[4]) == 0
local waiting, incarnations = {}, {}
local after = 5 + 3 * tonumber(ARGV[4])
for i = 5, after - 1, 3 do
  local pending = ARGV[2] .. ':' .. ARGV[i]
  if ARGV[i + 2] ~= 'waiting' then
    redis.call('HSET', KEYS[4], ARGV[i], ARGV[i + 2])
    redis.call('HDEL', KEYS[3], pending)
  elseif lost then
    redis.call('HSET', KEYS[4], ARGV[i], 'waiting')
    table.insert(waiting, ARGV[i])
    table.insert(incarnations, ARGV[i + 1])
  end
end
if #waiting > 0 then
  local entry = redis.call('XADD', KEYS[2], '*', 'event', 'command', 'command', ARGV[2],
    'workers', table.concat(waiting, ','), 'incarnations', table.concat(incarnations, ','), unpack(ARGV, after))
  for i = 5, after - 1, 3 do
    if ARGV[i + 2] == 'waiting' then
      redis.call('HSET', KEYS[3], ARGV[2] .. ':' .. ARGV[i], ARGV[i + 1] .. ' ' .. entry)
    end
  end
end
redis.call('EXPIRE', KEYS[4], ARGV[3])
return 1
