-- Forget a session.
--
-- KEYS  session, turns, mark of a recent deletion
-- ARGV  1 tenant  2 for how long the mark stands, in s, or 0 for none
-- Returns  {1 if there was such a session of the tenant, API key that paid for it or ''}

local session = redis.call('HMGET', KEYS[1], 'tenant', 'payer')
if session[1] and session[1] ~= ARGV[1] then return {0, ''} end
if tonumber(ARGV[2]) > 0 then redis.call('SET', KEYS[3], '', 'EX', ARGV[2]) end
redis.call('DEL', KEYS[1], KEYS[2])
return {session[1] and 1 or 0, session[2] or ''}
