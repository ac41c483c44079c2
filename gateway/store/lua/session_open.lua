-- Decide who owns a session id, and hand its newest turns to the owner. Atomic, so two tenants can't both be first.
--
-- KEYS  session, turns, mark of a recent deletion
-- ARGV  1 tenant  2 time to live in s  3 whether turns are wanted (0 or 1)  4 incarnation, if the session is new
--       5 whether it may be new (0 or 1)  6 a turn, as JSON, that a new session begins with, or nothing
--       7 most bytes of turns  8 API key that pays for the session if it is new
--       9 incarnation in which the request was accepted, or nothing for one that comes now
-- Returns  {'new' | 'owned' | 'taken' | 'deleted', turn number for this request, incarnation, turns and their numbers,
--          1 if there are more turns, API key that pays for it or ''}

local owner = redis.call('HGET', KEYS[1], 'tenant')
if (owner and owner ~= ARGV[1]) or (not owner and ARGV[5] == '0') then return {'taken', 0, '', {}, 0, ''} end
if ARGV[9] ~= '' and redis.call('HGET', KEYS[1], 'incarnation') ~= ARGV[9] then
  return {'deleted', 0, '', {}, 0, ''}
end
if not owner then
  redis.call('DEL', KEYS[2])
  local seeded = ARGV[6] ~= '' and redis.call('EXISTS', KEYS[3]) == 0
  if seeded then redis.call('ZADD', KEYS[2], 0, ARGV[6]) end
  redis.call('HSET', KEYS[1], 'tenant', ARGV[1], 'created', redis.call('TIME')[1], 'payer', ARGV[8],
    'bytes', seeded and #ARGV[6] or 0, 'kept', seeded and 1 or 0)
end
redis.call('HSETNX', KEYS[1], 'incarnation', ARGV[4])
local number = redis.call('HINCRBY', KEYS[1], 'turns', 1)
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
local turns, more = {}, 0
if ARGV[3] == '1' then turns, more = read_turns(KEYS[2], '+inf', 0, tonumber(ARGV[7])) end
local session = redis.call('HMGET', KEYS[1], 'incarnation', 'payer')
return {owner and 'owned' or 'new', number, session[1], turns, more, session[2] or ''}
