-- Set how many bytes one member of a key's account takes, and name those that must go.
--
-- KEYS  members by expiry in ms, bytes by member ('' is the sum): both of one API key
-- ARGV  1 member  2 its bytes; with a sign, those to add or take; or nothing to only renew its expiry if it is there  3 time to live in ms  4 most bytes
--       5 'evict' names the members that expire first, until the rest fits; 'refuse' changes nothing if it would not fit;
--         'note' takes the figure as it is
-- Returns  {1, or 0 if refused, bytes of all members, members that must go, each with its expiry as a string}

local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
local total = tonumber(redis.call('HGET', KEYS[2], '') or '0')
for _, expired in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now_ms, 'LIMIT', 0, 256)) do
  total = total - tonumber(redis.call('HGET', KEYS[2], expired) or '0')
  redis.call('HDEL', KEYS[2], expired)
  redis.call('ZREM', KEYS[1], expired)
end
local before = tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0')
local bytes = tonumber(ARGV[2]) or before
if string.match(ARGV[2], '^[+-]') then bytes = math.max(0, before + bytes) end
local most = tonumber(ARGV[4])
local absent = ARGV[2] == '' and not redis.call('ZSCORE', KEYS[1], ARGV[1])
local refused = ARGV[5] == 'refuse' and bytes > before and total - before + bytes > most
if not absent and not refused then
  total = total - before + bytes
  redis.call('ZADD', KEYS[1], now_ms + tonumber(ARGV[3]), ARGV[1])
  redis.call('HSET', KEYS[2], ARGV[1], bytes)
end
if redis.call('ZCARD', KEYS[1]) == 0 then
  redis.call('DEL', KEYS[1], KEYS[2])
  return {refused and 0 or 1, 0, {}}
end
redis.call('HSET', KEYS[2], '', total)
for i = 1, 2 do
  if redis.call('PTTL', KEYS[i]) < tonumber(ARGV[3]) then redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
end

local leaving = {}
if ARGV[5] == 'evict' and total > most then
  local over = total - most
  local oldest = redis.call('ZRANGE', KEYS[1], 0, 63, 'WITHSCORES')
  for i = 1, #oldest, 2 do
    if over <= 0 then break end
    if oldest[i] ~= ARGV[1] then
      over = over - tonumber(redis.call('HGET', KEYS[2], oldest[i]) or '0')
      table.insert(leaving, oldest[i])
      table.insert(leaving, oldest[i + 1])
    end
  end
end
return {refused and 0 or 1, total, leaving}
