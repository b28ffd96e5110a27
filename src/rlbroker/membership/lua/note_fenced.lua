-- Function: record in a worker's heartbeat the process of an old incarnation that was refused, so that people see two
-- processes with one worker id. Writes only beside the heartbeat of a living newer process: after a worker was
-- forgotten or left, there is no second process, and the fields would stay without a lifetime.

local function note_fenced(life, heartbeat, newest, process)
  if redis.call('HGET', heartbeat, 'incarnation') == newest and redis.call('HGET', life, 'member') == '1' then
    local time = redis.call('TIME')
    redis.call('HDEL', heartbeat, '')  -- lets the next write pass on a full server
    redis.call('HSET', heartbeat, 'fenced_process', process,
      'fenced_at', string.format('%.3f', time[1] + time[2] / 1000000))
  end
end
