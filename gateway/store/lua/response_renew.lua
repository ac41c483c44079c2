-- Renew the lease of a response that is being made.
--
-- KEYS  lease
-- ARGV  1 lease in s
-- Returns  1

redis.call('SET', KEYS[1], '', 'EX', ARGV[1])
return 1
