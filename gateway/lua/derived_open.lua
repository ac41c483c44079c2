-- Begin a derived session. It holds nothing until its first turn is stored.
--
-- KEYS  contents, expiries, bytes of all: all of one API key
-- ARGV  1 id  2 time to live in ms  3 most sessions
-- Returns  the id

local now_ms = now()
forget_expired(KEYS[1], KEYS[2], KEYS[3], now_ms)
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[2]), ARGV[1])
while redis.call('ZCARD', KEYS[2]) > tonumber(ARGV[3]) do
  forget(KEYS[1], KEYS[2], KEYS[3], redis.call('ZRANGE', KEYS[2], 0, 0)[1])
end
for i = 1, 3 do redis.call('PEXPIRE', KEYS[i], ARGV[2]) end
return ARGV[1]
