-- Tell its owner about a response, which is a use of it.
--
-- KEYS  response, state, turn, lease, mark, then those that may hold pieces
-- ARGV  1 tenant  2 time to live in s  3 whether the response itself is wanted (0 or 1)
-- Returns  {status, bytes of the turn, responses before it, API key that pays, process, 1 if a gateway is making it,
--          the response or ''}, or {} if there is no such response of the tenant

if redis.call('HGET', KEYS[2], 'tenant') ~= ARGV[1] then return {} end
local found = redis.call('HMGET', KEYS[2], 'status', 'turn_bytes', 'path', 'payer', 'process')
for i = 1, #KEYS do
  if i ~= 4 and i ~= 5 then redis.call('EXPIRE', KEYS[i], ARGV[2]) end
end
table.insert(found, redis.call('EXISTS', KEYS[4]))
table.insert(found, ARGV[3] == '1' and redis.call('GET', KEYS[1]) or '')
return found
