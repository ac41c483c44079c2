-- Take room for one generation, all or nothing. With 0 requests and 0 tokens it only tells where the caller stands.
--
-- KEYS  window, running (model), running (key), day budget: all of one API key, in one cluster slot
-- ARGV  1 lease member  2 requests (1 for the first generation of a request, else 0)  3 tokens
--       4 requests per minute  5 tokens per minute  6 concurrent (model)  7 concurrent (key)  8 tokens per day
--       9 lease in ms; limits of 0 mean none, but for 4 and 5, which are always set
-- Returns  {refused kind or '', bucket second, remaining requests, remaining tokens, reset requests, reset tokens,
--          retry after in ms}

local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)
local member, requests, tokens = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local limit_requests, limit_tokens = tonumber(ARGV[4]), tonumber(ARGV[5])
local window = read_window(KEYS[1], now_s)

local refused, retry_ms = '', 0

local function refuse(kind, ms)
  if ms > retry_ms then refused, retry_ms = kind, ms end
end

if requests + tokens > 0 then
  refuse('requests', wait_ms(window.r, limit_requests, requests, now_ms))
  refuse('tokens', wait_ms(window.t, limit_tokens, tokens, now_ms))
  for i = 2, 3 do
    local limit = tonumber(ARGV[i + 4])
    if limit > 0 and requests > 0 then
      redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now_ms)
      -- When a running request ends nobody knows; a second is a polite guess.
      if redis.call('ZCARD', KEYS[i]) >= limit then refuse('concurrent', 1000) end
    end
  end
  local budget = tonumber(ARGV[8])
  if budget > 0 and tonumber(redis.call('GET', KEYS[4]) or '0') + tokens > budget then
    refuse('daily_tokens', (86400 - now_s % 86400) * 1000)
  end
  if refused == '' then
    if requests > 0 then redis.call('HINCRBY', KEYS[1], 'r' .. now_s, requests) end
    redis.call('HINCRBY', KEYS[1], 't' .. now_s, tokens)
    redis.call('EXPIRE', KEYS[1], SPAN + 1)
    for i = 2, 3 do
      if tonumber(ARGV[i + 4]) > 0 then
        redis.call('ZADD', KEYS[i], now_ms + tonumber(ARGV[9]), member)
        redis.call('PEXPIRE', KEYS[i], tonumber(ARGV[9]))
      end
    end
    if budget > 0 then
      redis.call('INCRBY', KEYS[4], tokens)
      redis.call('EXPIRE', KEYS[4], 2 * 86400)
    end
    window.r.used = window.r.used + requests
    window.t.used = window.t.used + tokens
    table.insert(window.r.buckets, {now_s, requests})
    table.insert(window.t.buckets, {now_s, tokens})
  end
end

local left_requests, left_tokens, reset_requests, reset_tokens = standing(window, limit_requests, limit_tokens, now_s)
return {refused, now_s, left_requests, left_tokens, reset_requests, reset_tokens, retry_ms}
