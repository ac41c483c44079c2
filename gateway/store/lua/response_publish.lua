-- Show a new state of a response. Only the process that makes it may, and only as long as it was not deleted.
--
-- KEYS  response, state, turn, lease, mark of a deletion, then those that may hold pieces of the response and its turn
-- ARGV  1 tenant  2 process  3 whether it may be new (0 or 1)  4 time to live in s  5 status  6 response (see pieces.py)
--       7 turn, or nothing to leave it as it is  8 bytes of the turn  9 responses before it, as JSON
--       10 API key that pays for it  11 lease in s, 0 for none
-- Returns  1 if done

local state = redis.call('HMGET', KEYS[2], 'tenant', 'process')
if state[1] then
  if state[1] ~= ARGV[1] or state[2] ~= ARGV[2] then return 0 end
elseif ARGV[3] == '0' or redis.call('EXISTS', KEYS[5]) == 1 then
  return 0
end
redis.call('HSET', KEYS[2], 'tenant', ARGV[1], 'process', ARGV[2], 'status', ARGV[5], 'turn_bytes', ARGV[8],
  'path', ARGV[9], 'payer', ARGV[10])
redis.call('SET', KEYS[1], ARGV[6])
if ARGV[7] ~= '' then redis.call('SET', KEYS[3], ARGV[7]) end
for i = 1, #KEYS do
  if i ~= 4 and i ~= 5 then redis.call('EXPIRE', KEYS[i], ARGV[4]) end
end
if tonumber(ARGV[11]) > 0 then redis.call('SET', KEYS[4], '', 'EX', ARGV[11]) else redis.call('DEL', KEYS[4]) end
return 1
