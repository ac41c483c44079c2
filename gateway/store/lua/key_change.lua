-- Replace a record, if it is still what it was when it was read.
--
-- KEYS  1 record
-- ARGV  1 text that was read  2 text in its place
-- Returns  1 if replaced

if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2])
return 1
