-- Become the writer of a log, or a reader of the log that another writer holds. A log whose writer's lease has run out
-- is taken over with everything in it; one that was closed begins again. Numbers only ever grow: a log that takes over
-- continues after what was stored, and behind what the client has seen.
--
-- KEYS  log, entries, queue
-- ARGV  1 owner  2 writer  3 process  4 reader  5 number of the last frame that the client has seen
--       6 lease in ms  7 how long the reader counts as there, in ms  8 time to live in ms
--       9 writer that the process already is, or empty  10 most bytes of jobs
--       11 whether it may become the writer (0 or 1)
-- Returns  {'opened' | 'taken over' | 'attached' | 'refused', process, number, number before what is unfinished, running, queue or
--          the beginning of it}

local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local log = redis.call('HMGET', KEYS[1], 'writer', 'process', 'lease_until', 'last', 'since', 'running', 'closed')
local writer, process, last, since, running = log[1], log[2], tonumber(log[4] or '0'), log[5], log[6]
local open = writer and not log[7]

if open and (writer == ARGV[9] or tonumber(log[3]) > now_ms) then
  redis.call('HSET', KEYS[1], 'reader', ARGV[4], 'reader_until', now_ms + tonumber(ARGV[7]))
  return {'attached', process, last, tonumber(since), '', {}}
end

if ARGV[11] == '0' then return {'refused', '', 0, 0, '', {}} end
local number = math.max(last, tonumber(ARGV[5]))
if not open then redis.call('DEL', KEYS[1], KEYS[2], KEYS[3]) end
redis.call('HSET', KEYS[1], 'owner', ARGV[1], 'writer', ARGV[2], 'process', ARGV[3], 'reader', ARGV[4],
  'reader_until', now_ms + tonumber(ARGV[7]), 'lease_until', now_ms + tonumber(ARGV[6]), 'last', number)
if not open then redis.call('HSET', KEYS[1], 'since', number) end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[8]) end
if not open then return {'opened', ARGV[3], number, number, '', {}} end
-- Drop an incomplete frame: its writer disappeared before storing the last part.
for _, entry in ipairs(redis.call('XRANGE', KEYS[2], string.format('%.0f-0', last + 1), '+')) do
  redis.call('XDEL', KEYS[2], entry[1])
  redis.call('HINCRBY', KEYS[1], 'bytes', -#entry[2][4])
  redis.call('XSETID', KEYS[2], string.format('%.0f-1000000', last))
end
redis.call('HSET', KEYS[1], 'part', 0)
return {'taken over', ARGV[3], number, tonumber(since), running or '', (read_jobs(KEYS[3], 0, tonumber(ARGV[10])))}
