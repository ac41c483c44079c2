-- Store one turn under the number it got when its request came in, so that order is arrival, whoever finishes first.
-- Turns are trimmed oldest first to the bounds. A session that was deleted or taken over meanwhile stays as it is.
--
-- KEYS  owner, turns
-- ARGV  1 tenant  2 time to live in s  3 turn number  4 turn, as JSON that begins with its number
--       5 whether it replaces all earlier turns (0 or 1)  6 most turns  7 most bytes
-- Returns  1 if stored

if redis.call('HGET', KEYS[1], 'tenant') ~= ARGV[1] then return 0 end
if ARGV[5] == '1' then redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', '(' .. ARGV[3]) end
redis.call('ZADD', KEYS[2], ARGV[3], ARGV[4])
local turns = redis.call('ZRANGE', KEYS[2], 0, -1)
local bytes = 0
for i = #turns, 1, -1 do
  bytes = bytes + #turns[i]
  if #turns - i + 1 > tonumber(ARGV[6]) or bytes > tonumber(ARGV[7]) then
    redis.call('ZREMRANGEBYRANK', KEYS[2], 0, i - 1)
    break
  end
end
redis.call('EXPIRE', KEYS[1], ARGV[2])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
