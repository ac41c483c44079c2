-- Note the version of the layout, where none is noted.
--
-- KEYS  1 version
-- ARGV  1 version that this gateway speaks
-- Returns  1 if it was noted

return redis.call('SETNX', KEYS[1], ARGV[1])
