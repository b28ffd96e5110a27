-- further ARGV: id, the consumer of this learner that has it, how often it is handed out with this time
-- Has the server remember it, before a learner can die over it. Gives 0 where another learner has it now.

-- include: experience/lua/own_entries.lua

if not mine(ARGV[4]) then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[4], 'RETRYCOUNT', ARGV[6], 'JUSTID')
return 1
