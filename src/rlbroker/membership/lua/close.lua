-- Record that the learner ended, unless a newer learner leads the run.
-- KEYS: meta
-- ARGV: the learner's epoch
-- Reply: 1

if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'learner_state', 'ended')
end
return 1
