-- Decide who owns a session id, and hand its turns to the owner. Atomic, so two tenants can't both be first.
--
-- KEYS  owner, turns
-- ARGV  1 tenant  2 time to live in s  3 whether the turns are wanted (0 or 1)
-- Returns  {'new' | 'owned' | 'taken', turn number for this request, turns, oldest first}

local owner = redis.call('HGET', KEYS[1], 'tenant')
if owner and owner ~= ARGV[1] then return {'taken', 0, {}} end
if not owner then redis.call('HSET', KEYS[1], 'tenant', ARGV[1], 'created', redis.call('TIME')[1]) end
local number = redis.call('HINCRBY', KEYS[1], 'turns', 1)
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
local turns = {}
if ARGV[3] == '1' then turns = redis.call('ZRANGE', KEYS[2], 0, -1) end
return {owner and 'owned' or 'new', number, turns}
