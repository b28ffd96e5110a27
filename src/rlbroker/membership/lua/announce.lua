-- Joining and being given up are entries of the worker's own acknowledgement stream. From such an entry on, an
-- answer of an older incarnation has too small an id and is refused.

local function announce(stream, incarnation, event, version)
  local said = {'XADD', stream, incarnation .. '-0', 'event', event, 'version', version}
  local done = redis.pcall(unpack(said))
  if type(done) == 'table' and done['err'] then
    -- The worker itself wrote an id from the future. Its answers are worth nothing; the run goes on.
    redis.call('DEL', stream)
    redis.call(unpack(said))
  end
end
