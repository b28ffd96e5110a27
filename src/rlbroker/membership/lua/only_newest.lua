-- Guard: refuse a caller that is not the newest incarnation of a worker; KEYS[1] is the worker's life, ARGV[1] its id,
-- ARGV[2] the caller's incarnation. An incarnation ends when another process registers, or when the worker is forgotten
-- or leaves. Defines `newest`, the stored incarnation.

local newest = tonumber(redis.call('HGET', KEYS[1], 'incarnation') or '0') or 0
if newest > tonumber(ARGV[2]) then
  return redis.error_reply('FENCED worker ' .. ARGV[1] .. ' was replaced by a newer process, or it was silent ' ..
    'for longer than forget_seconds, or it has left; to run it again, omit worker_id or choose a free one')
end
