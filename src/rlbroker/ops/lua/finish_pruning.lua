-- Deletes the mark of a pruned run, unless a learner has opened the run since and added its own fields to meta.
-- KEYS: meta
-- ARGV: name of the mark
-- Reply: the number of deleted keys

if redis.call('HLEN', KEYS[1]) == 2 and redis.call('HGET', KEYS[1], ARGV[1]) then
  return redis.call('UNLINK', KEYS[1])
end
return 0
