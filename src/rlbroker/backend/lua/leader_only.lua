-- Include: let only the leading learner run the script.
-- KEYS[1]: `meta`; ARGV[1]: the learner's epoch
-- Errors: FENCED if a newer learner leads; LOST if the server has lost the run

local leading = tonumber(redis.call('HGET', KEYS[1], 'epoch') or '0') or 0
if leading > tonumber(ARGV[1]) then
  return redis.error_reply('FENCED a newer learner publishes in this run; ' ..
    'if several learners share the run, create all but one with publishes=False')
elseif leading < tonumber(ARGV[1]) then
  return redis.error_reply('LOST the server has lost the run')
end
