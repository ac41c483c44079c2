-- Write a new record; one that is there stays.
--
-- KEYS  1 record
-- ARGV  1 text
-- Returns  1 if written

return redis.call('SETNX', KEYS[1], ARGV[1])
