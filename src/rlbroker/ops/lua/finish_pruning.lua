-- KEYS: meta
-- ARGV: name of the mark
-- A learner that has opened the run keeps what it wrote.

if redis.call('HLEN', KEYS[1]) == 2 and redis.call('HGET', KEYS[1], ARGV[1]) then
  return redis.call('UNLINK', KEYS[1])
end
return 0
