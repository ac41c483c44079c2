-- The state of a response, for its owner.
--
-- KEYS  response, state, lease
-- ARGV  1 tenant  2 whether the response itself is wanted (0 or 1)
-- Returns  {status, bytes of the turn, responses before it, API key that pays, process, 1 if a gateway is making it,
--          the response or ''}, or {} if there is no such response of the tenant

if redis.call('HGET', KEYS[2], 'tenant') ~= ARGV[1] then return {} end
local found = redis.call('HMGET', KEYS[2], 'status', 'turn_bytes', 'path', 'payer', 'process')
table.insert(found, redis.call('EXISTS', KEYS[3]))
table.insert(found, ARGV[2] == '1' and redis.call('GET', KEYS[1]) or '')
return found
