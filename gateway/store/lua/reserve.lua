-- Take room for one generation, all or nothing. With 0 requests and 0 tokens it only tells where the caller stands.
--
-- KEYS  1 window  2 running (model)  3 running (key)  4 open reservations  5 their leases  6 to 8 budgets of three days:
--       all of one API key, in one cluster slot
-- ARGV  1 reservation id, or ''  2 lease member  3 requests (1 for the first generation of a request, else 0)  4 tokens
--       5 requests per minute  6 tokens per minute  7 concurrent (model)  8 concurrent (key)  9 tokens per day
--       10 lease in ms  11 ms on this server's clock after which nobody waits for the answer, 0 for none
--       12 number of the middle one of the three days since 1970
--       13 requests, 14 tokens in the window and 15 on the day that the caller knows of and this server does not
--       limits of 0 mean none, but for 5 and 6, which are always set
-- Returns  {refused kind or '', bucket second, remaining requests, remaining tokens, reset requests, reset tokens,
--          retry after in ms, now in ms, tokens of the day}; the kind `late` means that nothing was looked at

local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)
local id, member, requests, tokens = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local limit_requests, limit_tokens, budget = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[9])
local lease_ms, deadline_ms, middle_day = tonumber(ARGV[10]), tonumber(ARGV[11]), tonumber(ARGV[12])
local taken = nil

if deadline_ms > 0 and now_ms > deadline_ms then return {'late', now_s, 0, 0, 0, 0, 0, now_ms, 0} end
sweep(KEYS[4], KEYS[5], now_ms, 6, middle_day)
if id ~= '' then
  local known = redis.call('HGET', KEYS[4], id)
  if known == CLOSED then return {'late', now_s, 0, 0, 0, 0, 0, now_ms, 0} end
  if known then taken = tonumber(string.match(known, '^%d+')) end -- a command that was sent twice counts once
end

local window = read_window(KEYS[1], now_s)
local day = day_at(6, middle_day, now_s) or KEYS[7]
window.r.used = window.r.used + tonumber(ARGV[13])
window.t.used = window.t.used + tonumber(ARGV[14])
table.insert(window.r.buckets, {now_s, tonumber(ARGV[13])})
table.insert(window.t.buckets, {now_s, tonumber(ARGV[14])})

local refused, retry_ms = '', 0

local function refuse(kind, ms)
  if ms > retry_ms then refused, retry_ms = kind, ms end
end

if requests + tokens > 0 and not taken then
  refuse('requests', wait_ms(window.r, limit_requests, requests, now_ms))
  refuse('tokens', wait_ms(window.t, limit_tokens, tokens, now_ms))
  for i = 2, 3 do
    local limit = tonumber(ARGV[i + 5])
    if limit > 0 and requests > 0 then
      redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now_ms)
      -- When a running request ends nobody knows; a second is a polite guess.
      if redis.call('ZCARD', KEYS[i]) >= limit then refuse('concurrent', 1000) end
    end
  end
  if budget > 0 and tonumber(redis.call('GET', day) or '0') + tonumber(ARGV[15]) + tokens > budget then
    refuse('daily_tokens', (86400 - now_s % 86400) * 1000)
  end
  if refused == '' then
    charge_window(KEYS[1], now_s, now_s, tokens, requests)
    for i = 2, 3 do
      if tonumber(ARGV[i + 5]) > 0 then
        redis.call('ZADD', KEYS[i], now_ms + lease_ms, member)
        redis.call('PEXPIRE', KEYS[i], lease_ms)
      end
    end
    if budget > 0 then charge_day(day, tokens) end
    if id ~= '' then
      hold(KEYS[4], id, now_s, tokens, requests)
      lease(KEYS[4], KEYS[5], id, now_ms + lease_ms)
    end
    window.r.used = window.r.used + requests
    window.t.used = window.t.used + tokens
    table.insert(window.r.buckets, {now_s, requests})
    table.insert(window.t.buckets, {now_s, tokens})
  end
end

local spent_today = 0
if budget > 0 then spent_today = tonumber(redis.call('GET', day) or '0') end
local left_requests, left_tokens, reset_requests, reset_tokens = standing(window, limit_requests, limit_tokens, now_s)
return {refused, taken or now_s, left_requests, left_tokens, reset_requests, reset_tokens, retry_ms, now_ms,
  spent_today}
