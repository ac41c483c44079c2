-- Store one turn under the number it got when its request came in, so that the order is that of arrival.
-- Turns are trimmed oldest first to the bounds. A session that was deleted or taken over meanwhile stays as it is,
-- also if there is a session under its id again: that is another incarnation.
--
-- KEYS  session, turns
-- ARGV  1 tenant  2 incarnation  3 time to live in s  4 turn number  5 turn or a piece of it (see session_turns.lua),
--       or nothing for one that is too large to be kept: then those before it go as well
--       6 whether it replaces all earlier turns (0 or 1)  7 whether it is the turn's first piece (0 or 1)
--       8 most turns  9 most bytes  10 API key that pays for the session from now on
-- Returns  {1 if stored, bytes of all turns and of what the set needs for them, API key that paid so far or ''}

local session = redis.call('HMGET', KEYS[1], 'tenant', 'incarnation', 'bytes', 'kept', 'payer')
if session[1] ~= ARGV[1] or session[2] ~= ARGV[2] then return {0, 0, ''} end
local bytes, kept = tonumber(session[3]), tonumber(session[4])
if not bytes then -- written before these were counted
  bytes, kept = 0, 0
  for _, turn in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do bytes, kept = bytes + #turn, kept + 1 end
end

local function drop_oldest(before)
  local oldest = redis.call('ZRANGE', KEYS[2], 0, 0, 'WITHSCORES')
  if not oldest[1] or (before and tonumber(oldest[2]) >= before) then return false end
  for _, piece in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], oldest[2], oldest[2])) do bytes = bytes - #piece end
  redis.call('ZREMRANGEBYSCORE', KEYS[2], oldest[2], oldest[2])
  kept = kept - 1
  return true
end

local number = tonumber(ARGV[4])
if ARGV[7] == '1' then
  if ARGV[6] == '1' or ARGV[5] == '' then while drop_oldest(number) do end end
  if ARGV[5] ~= '' then kept = kept + 1 end
elseif redis.call('ZCOUNT', KEYS[2], number, number) == 0 then
  return {0, 0, ''} -- what was stored of it had to go
end
if ARGV[5] ~= '' and redis.call('ZADD', KEYS[2], number, ARGV[5]) == 1 then bytes = bytes + #ARGV[5] end
while kept > tonumber(ARGV[8]) or bytes > tonumber(ARGV[9]) do
  if not drop_oldest() then break end
end
redis.call('HSET', KEYS[1], 'bytes', bytes, 'kept', kept, 'payer', ARGV[10])
redis.call('EXPIRE', KEYS[1], ARGV[3])
redis.call('EXPIRE', KEYS[2], ARGV[3])
return {1, bytes + 128 * kept, session[5] or ''}
