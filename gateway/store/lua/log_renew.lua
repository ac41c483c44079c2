-- Renew a writer's lease, and return what other gateways have done to its log. A lease of 0 ms gives the log away.
--
-- KEYS  log, entries, queue
-- ARGV  1 writer  2 lease in ms  3 time to live in ms  4 how much of the queue it knows  5 most bytes of jobs
-- Returns  {reader, how long that still counts as there in ms, why the log was closed or '', the rest of the queue or
--          the beginning of it, 1 if there is more of it}, or {} if the log is another writer's or gone

local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local log = redis.call('HMGET', KEYS[1], 'writer', 'reader', 'reader_until', 'closed')
if log[1] ~= ARGV[1] then return {} end
redis.call('HSET', KEYS[1], 'lease_until', now_ms + tonumber(ARGV[2]))
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
local left_ms = math.max(0, tonumber(log[3] or '0') - now_ms)
return {log[2] or '', left_ms, log[4] or '', read_jobs(KEYS[3], tonumber(ARGV[4]), tonumber(ARGV[5]))}
