-- Return the log entries after a number.
--
-- KEYS  log, entries
-- ARGV  1 owner  2 number of the last frame that it has  3 how many parts of the next one it has  4 most bytes
--       5 reader, of whom only the newest may continue, or empty where any number may read
--       6 how long it counts as there, in ms
-- Returns  {'gone' | 'replaced' | 'closed' | 'orphaned' | 'ended' | 'running', number of the last frame,
--          why it was closed,
--          entries as {number of the first frame, number of the last, place of the part, number of parts, frames},
--          1 if it is time to note that the reader is there, see log_present.lua}

local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local log = redis.call('HMGET', KEYS[1], 'owner', 'reader', 'closed', 'ended', 'lease_until', 'last', 'reader_until')
if log[1] ~= ARGV[1] then return {'gone', 0, '', {}, 0} end
local last = tonumber(log[6])
if ARGV[5] ~= '' and log[2] ~= ARGV[5] then return {'replaced', last, '', {}, 0} end
if log[3] then return {'closed', last, log[3], {}, 0} end

-- Not with every look: each write goes to the file and to the replicas.
local due = tonumber(log[7] or '0') < now_ms + tonumber(ARGV[6]) / 2
local entries, bytes = {}, 0
local from = string.format('%.0f-%s', tonumber(ARGV[2]) + 1, ARGV[3])
while bytes < tonumber(ARGV[4]) do
  local entry = redis.call('XRANGE', KEYS[2], from, '+', 'COUNT', 1)[1]
  if not entry then break end
  local number, part = string.match(entry[1], '^(%d+)-(%d+)$')
  table.insert(entries, {tonumber(entry[2][2]), tonumber(number), tonumber(part), tonumber(entry[2][6] or '0'), entry[2][4]})
  bytes = bytes + #entry[2][4]
  from = '(' .. entry[1]
end
local state = 'running'
if log[4] then state = 'ended' elseif tonumber(log[5]) <= now_ms then state = 'orphaned' end
return {state, last, '', entries, due and 1 or 0}
