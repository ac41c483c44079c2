-- Add members to a set that lists something.
--
-- KEYS  1 set
-- ARGV  members
-- Returns  how many are new

return redis.call('SADD', KEYS[1], unpack(ARGV))
