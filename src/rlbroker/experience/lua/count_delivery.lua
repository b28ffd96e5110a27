-- Records how often an entry was delivered, before the learner can die over it.
-- KEYS: as in own_entries.lua
-- ARGV: as in own_entries.lua; then id, the consumer of this learner that has it, deliveries with this one
-- Reply: 1; 0 if another learner has the entry now.

-- include: experience/lua/own_entries.lua

if not owns(ARGV[4]) then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[4], 'RETRYCOUNT', ARGV[6], 'JUSTID')
return 1
