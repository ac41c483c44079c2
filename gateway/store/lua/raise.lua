-- Raise a counter.
--
-- KEYS  1 counter
-- Returns  its value

return redis.call('INCR', KEYS[1])
