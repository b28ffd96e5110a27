-- Function: append an event to a worker's acknowledgement stream as the first entry of an incarnation: it joined, or it
-- was forgotten. Redis then refuses later entries of older incarnations, because their ids are smaller.

local function announce(stream, incarnation, event, version)
  local entry = {'XADD', stream, incarnation .. '-0', 'event', event, 'version', version}
  local reply = redis.pcall(unpack(entry))
  if type(reply) == 'table' and reply['err'] then
    -- The worker wrote an entry with an id from the future. Drop its acknowledgements, so that the run continues.
    redis.call('DEL', stream)
    redis.call(unpack(entry))
  end
end
