-- Record the number of deliveries of an entry, before the learner gets it and may crash.
-- KEYS: as in own_entries.lua
-- ARGV: as in own_entries.lua; then id, the consumer of this learner that has it, deliveries including this one
-- Reply: 1; 0 if this learner does not have the entry
-- Errors: as in own_entries.lua

-- include: experience/lua/own_entries.lua

if not owns(ARGV[4]) then return 0 end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[5], 0, ARGV[4], 'RETRYCOUNT', ARGV[6], 'JUSTID')
return 1
