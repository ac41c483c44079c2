-- Hand older turns of a session to its owner.
--
-- KEYS  session, turns
-- ARGV  1 tenant  2 the turn number to continue at, or '+inf'  3 how many members with that number are known
--       4 most bytes of turns
-- Returns  {when it was created, turns and their numbers, 1 if there are more}, or {} if there is no such session of the tenant

local session = redis.call('HMGET', KEYS[1], 'tenant', 'created')
if session[1] ~= ARGV[1] then return {} end
local turns, more = read_turns(KEYS[2], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4]))
return {session[2], turns, more}
