-- KEYS: meta
-- ARGV: epoch of the learner that ends

if redis.call('HGET', KEYS[1], 'epoch') == ARGV[1] then
  redis.call('HSET', KEYS[1], 'learner_state', 'ended')
end
return 1
