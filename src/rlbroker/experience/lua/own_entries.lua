-- Include: refuse a fenced learner, define `count` and `owns`, and reply {0} if the stream or its group is lost.
-- KEYS: a stream, its worker's counts, the epochs of its learners
-- ARGV: group, the learner's name, its epoch
-- Errors: FENCED if a newer learner of this name has taken over

if tonumber(redis.call('HGET', KEYS[3], ARGV[2]) or '0') > tonumber(ARGV[3]) then
  return redis.error_reply('FENCED a newer learner with this name has taken over the run')
end

-- include: experience/lua/ensure_counts.lua

local function count(field, by)
  local done = redis.pcall('HINCRBY', KEYS[2], field, by)
  -- A worker may write anything here: a field that is not a number starts again.
  if type(done) == 'table' and done['err'] then redis.call('HSET', KEYS[2], field, by) end
end
-- Returns whether an entry is pending for this learner: false if for another learner, nil if for none.
local function owns(id)
  local row = redis.call('XPENDING', KEYS[1], ARGV[1], id, id, 1)[1]
  if not row then return nil end
  return row[2] == ARGV[2] or row[2] == ARGV[2] .. '+'
end
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[1])
if groups['err'] or #groups == 0 then return {0} end  -- an error: it is missing, or its worker changed its type
