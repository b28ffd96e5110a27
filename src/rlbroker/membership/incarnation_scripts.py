"""Lua that membership's scripts begin with: numbers for new lives, who is silent, how joining and its end are said."""

from __future__ import annotations

#: Gives the number of a new life: an incarnation, or a learner's epoch. It is the time in milliseconds, or one
#: more than the last number. A server that came back empty does not know the last one; a plain counter would
#: give numbers that were used before, and what a new process sends would be taken for what was delivered already.
#: A last number that no clock can have given is nonsense that a worker wrote.
NEXT_LIFE = """
    local function next_life(last)
      local time = redis.call('TIME')
      local now = time[1] * 1000 + math.floor(time[2] / 1000)
      local before = tonumber(last) or 0
      if not (before < 2 * now) then before = 0 end
      return string.format('%.0f', math.max(before + 1, now))
    end
"""

#: Gives since when a member is silent, in milliseconds, nil for who is none. The time before the learner came back
#: does not count: nobody could be heard of then.
HEARD_OF = """
    local function heard_of(life, meta)
      local found = redis.call('HMGET', life, 'member', 'seen')
      if found[1] ~= '1' then return nil end
      return math.max(tonumber(found[2]) or 0, tonumber(redis.call('HGET', meta, 'back_at') or '0') or 0)
    end
"""

#: Notes in the heartbeat of a worker's present life which process was turned away, as its incarnation is over. Only
#: where a newer process lives: who was forgotten, or has left, is nobody's twin. Nothing is made that would stay.
NOTE_FENCED = """
    local function note_fenced(life, heartbeat, newest, process)
      if redis.call('HGET', heartbeat, 'incarnation') == newest and redis.call('HGET', life, 'member') == '1' then
        local time = redis.call('TIME')
        redis.call('HDEL', heartbeat, '')  -- also on a full server
        redis.call('HSET', heartbeat, 'fenced_process', process,
          'fenced_at', string.format('%.3f', time[1] + time[2] / 1000000))
      end
    end
"""

#: Joining and being given up are entries of the worker's own acknowledgement stream. From such an entry on, an
#: answer of an older incarnation has too small an id and is refused.
ANNOUNCE = """
    local function announce(stream, incarnation, event, version)
      local said = {'XADD', stream, incarnation .. '-0', 'event', event, 'version', version}
      local done = redis.pcall(unpack(said))
      if type(done) == 'table' and done['err'] then
        -- The worker itself wrote an id from the future. Its answers are worth nothing; the run goes on.
        redis.call('DEL', stream)
        redis.call(unpack(said))
      end
    end
"""
