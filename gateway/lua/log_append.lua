-- Store a batch of frames, and what changes with it. A batch that is sent again because the answer to it was lost
-- changes nothing.
--
-- KEYS  log, entries, queue
-- ARGV  1 writer  2 number of the first frame  3 of the last  4 frames, or nothing, for fields alone
--       5 most bytes of all entries
--       6 time to live in ms  7 how many of the queue are done, from its head  8... fields of the log and their values
-- Returns  1, or 0 if the log is another writer's or gone

if redis.call('HGET', KEYS[1], 'writer') ~= ARGV[1] then return 0 end
if ARGV[4] == '' then
  if ARGV[8] then redis.call('HSET', KEYS[1], unpack(ARGV, 8)) end
elseif tonumber(ARGV[3]) > tonumber(redis.call('HGET', KEYS[1], 'last')) then
  local id = ARGV[3] .. '-0'
  redis.call('XADD', KEYS[2], id, 'first', ARGV[2], 'frames', ARGV[4])
  local bytes = redis.call('HINCRBY', KEYS[1], 'bytes', #ARGV[4])
  while bytes > tonumber(ARGV[5]) do
    local oldest = redis.call('XRANGE', KEYS[2], '-', '+', 'COUNT', 1)[1]
    if oldest[1] == id then break end
    redis.call('XDEL', KEYS[2], oldest[1])
    bytes = redis.call('HINCRBY', KEYS[1], 'bytes', -#oldest[2][4])
  end
  for _ = 1, tonumber(ARGV[7]) do redis.call('LPOP', KEYS[3]) end
  redis.call('HSET', KEYS[1], 'last', ARGV[3], unpack(ARGV, 8))
end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[6]) end
return 1
