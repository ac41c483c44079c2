-- Note that a reader is there, unless a newer one took its place.
--
-- KEYS  log
-- ARGV  1 owner  2 reader, or empty where any number may read  3 how long it counts as there, in ms
-- Returns  1

local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local log = redis.call('HMGET', KEYS[1], 'owner', 'reader')
if log[1] == ARGV[1] and (ARGV[2] == '' or log[2] == ARGV[2]) then
  redis.call('HSET', KEYS[1], 'reader_until', now_ms + tonumber(ARGV[3]))
end
return 1
