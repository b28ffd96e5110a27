-- Notes in the heartbeat of a worker's present life which process was turned away, as its incarnation is over. Only
-- where a newer process lives: who was forgotten, or has left, is nobody's twin. Nothing is made that would stay.

local function note_fenced(life, heartbeat, newest, process)
  if redis.call('HGET', heartbeat, 'incarnation') == newest and redis.call('HGET', life, 'member') == '1' then
    local time = redis.call('TIME')
    redis.call('HDEL', heartbeat, '')  -- also on a full server
    redis.call('HSET', heartbeat, 'fenced_process', process,
      'fenced_at', string.format('%.3f', time[1] + time[2] / 1000000))
  end
end
