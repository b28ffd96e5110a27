-- Defines fingerprint(): a digest of the first keys, which every use of a run or of a worker's queue changes.
-- KEYS: keys of any type and kind
-- ARGV: how many of them to read, …

local function fingerprint()
  local parts = {}
  for i = 1, tonumber(ARGV[1]) do
    local kind, found = redis.call('TYPE', KEYS[i]).ok, {}
    if kind == 'hash' then
      local fields = redis.call('HGETALL', KEYS[i])
      for j = 1, #fields, 2 do table.insert(found, #fields[j] .. ':' .. fields[j] .. fields[j + 1]) end
      table.sort(found)
    elseif kind == 'set' then
      found = redis.call('SCARD', KEYS[i])
    elseif kind == 'stream' then
      found = redis.call('XLEN', KEYS[i])
    end
    table.insert(parts, {kind, found})
  end
  return redis.sha1hex(cmsgpack.pack(parts))
end
