-- Store what was said in a derived session, in place of what is stored. Those that were not used for longest go where
-- all together are too large. One that was deleted or used by its id meanwhile stays as it is.
--
-- KEYS  contents, expiries, prompts: all of one API key
-- ARGV  1 id  2 what was said, as JSON, or nothing if it is too large  3 time to live in ms  4 most bytes of all
--       5 digest of the prompt, or nothing  6 digest with its answer
-- Returns  1 if stored

local now_ms = now()
forget_expired(KEYS[1], KEYS[2], KEYS[3], now_ms)
if forget(KEYS[1], KEYS[2], KEYS[3], ARGV[1]) == 0 or ARGV[2] == '' then return 0 end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2])
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[3]), ARGV[1])
local bytes = redis.call('HINCRBY', KEYS[3], '', #ARGV[2])
for _, id in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if bytes <= tonumber(ARGV[4]) then break end
  local size = redis.call('HSTRLEN', KEYS[1], id)
  if size > 0 then -- else its first turn is still running
    forget(KEYS[1], KEYS[2], KEYS[3], id)
    bytes = bytes - size
  end
end
if ARGV[5] ~= '' and redis.call('HGET', KEYS[3], ARGV[5]) == ARGV[1] then
  redis.call('HSET', KEYS[3], ARGV[5], ARGV[1] .. ' ' .. ARGV[6])
end
for i = 1, 2 do redis.call('PEXPIRE', KEYS[i], ARGV[3]) end
if redis.call('PTTL', KEYS[3]) < 0 then redis.call('PEXPIRE', KEYS[3], ARGV[3]) end
return 1
