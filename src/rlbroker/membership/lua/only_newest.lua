-- Put into scripts that only the newest life of a worker may run; KEYS[1] is its `life:`, ARGV[1] the worker's
-- id, ARGV[2] its incarnation. Whoever is replaced, struck or leaves has an incarnation that is over.

local newest = tonumber(redis.call('HGET', KEYS[1], 'incarnation') or '0') or 0
if newest > tonumber(ARGV[2]) then
  return redis.error_reply('FENCED worker ' .. ARGV[1] .. ' was replaced by a newer process, or it was silent ' ..
    'for longer than forget_seconds, or it has left; if nothing took its place, start it again')
end
