-- Put a job at the end of its client's queue.
--
-- KEYS  log, queue
-- ARGV  1 job  2 most jobs, the running one included
-- Returns  {'absent' | 'full' | 'queued', how many are before it, process that runs them}

local log = redis.call('HMGET', KEYS[1], 'process', 'closed')
if not log[1] or log[2] then return {'absent', 0, ''} end
local before = redis.call('LLEN', KEYS[2])
if before >= tonumber(ARGV[2]) then return {'full', before, log[1]} end
redis.call('RPUSH', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], math.max(1, redis.call('PTTL', KEYS[1])))
return {'queued', before, log[1]}
