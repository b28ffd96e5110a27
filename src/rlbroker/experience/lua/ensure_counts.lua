-- The worker may write to its counts, whatever it likes: what is no hash goes.

local kind = redis.call('TYPE', KEYS[2])['ok']
if kind ~= 'hash' and kind ~= 'none' then redis.call('DEL', KEYS[2]) end
