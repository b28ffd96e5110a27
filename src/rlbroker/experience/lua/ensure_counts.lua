-- Include: delete the key of a worker's counts if it is not a hash, because a worker may write anything there.
-- KEYS: (any key), the worker's counts

local kind = redis.call('TYPE', KEYS[2])['ok']
if kind ~= 'hash' and kind ~= 'none' then redis.call('DEL', KEYS[2]) end
