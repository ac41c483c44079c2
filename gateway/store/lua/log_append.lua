-- Store a batch of frames, and what changes with it. A batch that is sent again because the answer to it was lost
-- changes nothing. A frame too large for one entry comes in parts; it counts as stored with the last of them.
--
-- KEYS  log, entries, queue
-- ARGV  1 writer  2 number of the first frame  3 of the last  4 frames, or nothing, for fields alone
--       5 most bytes of all entries
--       6 time to live in ms  7 how many of the queue are done, from its head
--       8 place of the part, from 0  9 number of parts, or 0 for whole frames  10... fields of the log and their values
-- Returns  1, or 0 if the log is another writer's or gone

local log = redis.call('HMGET', KEYS[1], 'writer', 'last', 'part')
if log[1] ~= ARGV[1] then return 0 end
local part, parts = tonumber(ARGV[8]), tonumber(ARGV[9])
local complete = part + 1 >= parts
if ARGV[4] == '' then
  if ARGV[10] then redis.call('HSET', KEYS[1], unpack(ARGV, 10)) end
elseif tonumber(ARGV[3]) > tonumber(log[2]) and part >= tonumber(log[3] or '0') then
  local id = ARGV[3] .. '-' .. ARGV[8]
  redis.call('XADD', KEYS[2], id, 'first', ARGV[2], 'frames', ARGV[4], 'parts', parts)
  local bytes = redis.call('HINCRBY', KEYS[1], 'bytes', #ARGV[4])
  while bytes > tonumber(ARGV[5]) do
    local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
    if oldest[1] == id then break end
    redis.call('XDEL', KEYS[2], oldest[1])
    bytes = redis.call('HINCRBY', KEYS[1], 'bytes', -#oldest[2][4])
  end
  if complete then
    for _ = 1, tonumber(ARGV[7]) do redis.call('LPOP', KEYS[3]) end
    redis.call('HSET', KEYS[1], 'last', ARGV[3], 'part', 0, unpack(ARGV, 10))
  else
    redis.call('HSET', KEYS[1], 'part', part + 1)
  end
end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[6]) end
return 1
