"""The scripts with which a worker opens its queue, and makes room in it."""

from __future__ import annotations

from rlbroker.backend.connection import Script

OPEN_QUEUE = Script(
    "open_queue",
    """
    -- KEYS: the worker's experiences, its counts
    -- ARGV: incarnation, group, number of the last batch that this life has stored
    -- Gives the number of the last batch of this life that is or was here, and the bytes that were ever sent:
    -- -1 where what the worker knows of them is still true.
    local mine = tonumber(ARGV[1])
    local known = tonumber(redis.call('HGET', KEYS[2], 'incarnation') or '0') or 0
    if redis.call('EXISTS', KEYS[1]) == 0 or #redis.call('XINFO', 'GROUPS', KEYS[1]) == 0 then
      redis.call('XGROUP', 'CREATE', KEYS[1], ARGV[2], '0', 'MKSTREAM')
    end
    local life, last = 0, 0
    local info = redis.call('XINFO', 'STREAM', KEYS[1])
    for i = 1, #info, 2 do
      if info[i] == 'last-generated-id' then
        local found_life, found_last = string.match(info[i + 1], '^(%d+)-(%d+)$')
        life, last = tonumber(found_life), tonumber(found_last)
      end
    end
    if known > mine or life > mine then
      return redis.error_reply('FENCED a newer process has this worker id')
    end
    if known < mine then
      if known > 0 and life == known then
        -- The life before may have ended without saying how much it sent.
        local said = tonumber(redis.call('HGET', KEYS[2], 'sent:' .. known) or '0') or 0
        redis.call('HSET', KEYS[2], 'sent:' .. known, string.format('%.0f', math.max(said, last)))
      end
      redis.call('HSET', KEYS[2], 'incarnation', ARGV[1])
      -- What lives before the last one counted under their own names becomes one sum; the last may still count.
      local counts = redis.call('HGETALL', KEYS[2])
      for i = 1, #counts, 2 do
        local reason, of = string.match(counts[i], '^([%a_]+):(%d+)$')
        if reason and reason ~= 'epoch' and tonumber(of) < known then
          redis.call('HSET', KEYS[2], reason,
            (tonumber(redis.call('HGET', KEYS[2], reason) or '0') or 0) + (tonumber(counts[i + 1]) or 0))
          redis.call('HDEL', KEYS[2], counts[i])
        end
      end
    end
    if life < mine then
      -- From here on every entry of an older incarnation has too small an id and is refused.
      redis.call('XDEL', KEYS[1], redis.call('XADD', KEYS[1], ARGV[1] .. '-0', 'incarnation', ARGV[1]))
      last = 0
    end
    if known == mine and last >= tonumber(ARGV[3]) then
      return {last, -1}
    end
    -- Bytes that were ever sent: those that were removed, and those that are here.
    local total = tonumber(redis.call('HGET', KEYS[2], 'removed_bytes') or '0') or 0
    local position = '-'
    while true do
      local entry = redis.call('XRANGE', KEYS[1], position, '+', 'COUNT', 1)[1]
      if not entry then break end
      for i = 1, #entry[2], 2 do
        if entry[2][i] == 'stored_bytes' then total = total + (tonumber(entry[2][i + 1]) or 0) end
      end
      position = '(' .. entry[1]
    end
    return {last, total}
    """,
)

STATE = Script(
    "state",
    """
    -- KEYS: the worker's counts
    -- ARGV: incarnation, then field and value pairs: what this life says of itself, in absolute numbers
    local newest = tonumber(redis.call('HGET', KEYS[1], 'incarnation') or '0') or 0
    if newest > tonumber(ARGV[1]) and redis.call('HEXISTS', KEYS[1], 'sent:' .. ARGV[1]) == 0 then
      return 0  -- it was replaced more than once, and what it said is in the sums of all lives
    end
    for i = 2, #ARGV, 2 do
      -- What the server itself counted may be more than the worker heard of.
      local counted = string.match(ARGV[i], '^dropped_oldest:') and redis.call('HGET', KEYS[1], ARGV[i])
      if not counted or tonumber(counted) < tonumber(ARGV[i + 1]) then
        redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
      end
    end
    return 1
    """,
)

DROP_OLDEST = Script(
    "drop_oldest",
    """
    -- KEYS: the worker's experiences, its counts
    -- ARGV: group, entries that may stay waiting, bytes that may stay held, bytes that were ever sent, incarnation
    -- Gives how many this life has dropped, the last id that was delivered, and the first that waits.
    local newest = tonumber(redis.call('HGET', KEYS[2], 'incarnation') or '0') or 0
    if newest > tonumber(ARGV[5]) then
      return redis.error_reply('FENCED a newer process has this worker id')
    elseif newest < tonumber(ARGV[5]) or redis.call('EXISTS', KEYS[1]) == 0 then
      return redis.error_reply('LOST the server lost the queue')
    end
    local function waiting()
      local pending = redis.call('XPENDING', KEYS[1], ARGV[1])[1]
      return redis.call('XLEN', KEYS[1]) - pending
    end
    local last_read = '0-0'
    for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[1])) do
      local fields = {}
      for i = 1, #group, 2 do fields[group[i]] = group[i + 1] end
      if fields['name'] == ARGV[1] then last_read = fields['last-delivered-id'] end
    end
    local removed = tonumber(redis.call('HGET', KEYS[2], 'removed_bytes') or '0') or 0
    local dropped = 0
    local first = '18446744073709551615-18446744073709551615'
    while true do
      -- What the learner has read is in its hands and cannot be taken back.
      local oldest = redis.call('XRANGE', KEYS[1], '(' .. last_read, '+', 'COUNT', 1)[1]
      if not oldest then break end
      first = oldest[1]
      if waiting() <= tonumber(ARGV[2]) and tonumber(ARGV[4]) - removed <= tonumber(ARGV[3]) then break end
      for i = 1, #oldest[2], 2 do
        if oldest[2][i] == 'stored_bytes' then removed = removed + tonumber(oldest[2][i + 1]) end
      end
      redis.call('XDEL', KEYS[1], oldest[1])
      dropped = dropped + 1
      first = '18446744073709551615-18446744073709551615'
    end
    redis.call('HSET', KEYS[2], 'removed_bytes', string.format('%.0f', removed))
    return {redis.call('HINCRBY', KEYS[2], 'dropped_oldest:' .. ARGV[5], dropped), last_read, first}
    """,
)
