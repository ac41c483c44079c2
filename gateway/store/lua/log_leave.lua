-- Note that a reader has left, unless a newer one took its place.
--
-- KEYS  log
-- ARGV  1 reader
-- Returns  the process that writes the log, or nil if there is no such reader

local log = redis.call('HMGET', KEYS[1], 'reader', 'process')
if log[1] ~= ARGV[1] then return false end
redis.call('HSET', KEYS[1], 'reader_until', 0)
return log[2]
