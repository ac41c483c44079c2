-- Close one generation: give back what it did not use, free its lease, and write the ledger. Exactly once: entries of
-- one gateway process carry rising numbers, and a number that was applied before is ignored.
--
-- KEYS  window, running (model), running (key), day budget, applied, usage, usage index: all of one API key
-- ARGV  1 gateway process  2 entry number  3 lease member to free, or ''  4 bucket second, 0 if nothing was reserved
--       5 tokens to give back  6 requests per minute  7 tokens per minute  8 tokens per day, 0 for none
--       9 usage index member  10 days to keep usage  then pairs of usage field and increment
-- Returns  {1 if applied, remaining requests, remaining tokens, reset requests, reset tokens}

local now_s = tonumber(redis.call('TIME')[1])
local number, bucket, refund = tonumber(ARGV[2]), tonumber(ARGV[4]), tonumber(ARGV[5])
local applied = 0

if tonumber(redis.call('HGET', KEYS[5], ARGV[1]) or '-1') < number then
  applied = 1
  redis.call('HSET', KEYS[5], ARGV[1], number)
  redis.call('EXPIRE', KEYS[5], 30 * 86400)
  if ARGV[3] ~= '' then
    redis.call('ZREM', KEYS[2], ARGV[3])
    redis.call('ZREM', KEYS[3], ARGV[3])
  end
  if bucket > 0 and refund ~= 0 then
    if redis.call('HEXISTS', KEYS[1], 't' .. bucket) == 1 then
      redis.call('HINCRBY', KEYS[1], 't' .. bucket, -refund)
    end
    if tonumber(ARGV[8]) > 0 and redis.call('EXISTS', KEYS[4]) == 1 then redis.call('DECRBY', KEYS[4], refund) end
  end
  for i = 11, #ARGV, 2 do
    if ARGV[i + 1] ~= '0' then redis.call('HINCRBY', KEYS[6], ARGV[i], ARGV[i + 1]) end
  end
  redis.call('EXPIRE', KEYS[6], tonumber(ARGV[10]) * 86400)
  redis.call('SADD', KEYS[7], ARGV[9])
  redis.call('EXPIRE', KEYS[7], tonumber(ARGV[10]) * 86400)
end

local window = read_window(KEYS[1], now_s)
return {applied, standing(window, tonumber(ARGV[6]), tonumber(ARGV[7]), now_s)}
