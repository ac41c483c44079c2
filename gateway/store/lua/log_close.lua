-- Close a log and drop its queue. Its readers have a moment to learn why.
--
-- KEYS  log, entries, queue
-- ARGV  1 writer, or empty for a caller entitled to it  2 why  3 how long it is still known, in ms; 0: until its
--       writer has seen it
-- Returns  the process that writes it, or nil if there is no such log

local log = redis.call('HMGET', KEYS[1], 'writer', 'process', 'closed')
if not log[1] or (ARGV[1] ~= '' and log[1] ~= ARGV[1]) or (ARGV[1] == '' and log[3]) then return false end
if not log[3] then redis.call('HSET', KEYS[1], 'closed', ARGV[2]) end
redis.call('DEL', KEYS[3])
if tonumber(ARGV[3]) > 0 then
  for i = 1, 2 do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
end
return log[2]
