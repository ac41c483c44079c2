-- Free the leases of requests that have ended.
--
-- KEYS  1 running (model)  2 running (key)
-- ARGV  members
-- Returns  1

for i = 1, 2 do redis.call('ZREM', KEYS[i], unpack(ARGV)) end
return 1
