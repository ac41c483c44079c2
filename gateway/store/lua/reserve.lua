-- Take room for one generation, all or nothing. If nothing is wanted it only reports the caller's standing.
--
-- KEYS  1 window  2 running (model)  3 running (key)  4 open reservations  5 their leases  6 to 8 budgets of three days:
--       all of one API key, in one cluster slot
-- ARGV  1 reservation id, or ''  2 lease member  3 amounts wanted (r is 1 for the first generation of a request, else 0)
--       4 limits per minute of all dimensions that have one
--       5 amounts in the window that the caller knows of and this server does not
--       6 concurrent (model)  7 concurrent (key)  8 tokens per day, each 0 for no limit
--       9 lease in ms  10 ms on this server's clock after which the caller has stopped waiting, 0 for none
--       11 number of the middle one of the three days since 1970  12 tokens on the day, as 5
-- Returns  {refused kind or '', bucket second, retry after in ms, now in ms, tokens of the day, then the remaining amount
--          and the reset of each dimension}; a kind is a dimension's letter, `concurrent`, `daily_tokens`, or `late`,
--          which means that nothing was looked at

local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)
local id, member, wanted = ARGV[1], ARGV[2], read_amounts(ARGV[3])
local limits, letters = read_amounts(ARGV[4])
local requests, tokens, budget = wanted.r or 0, wanted.t or 0, tonumber(ARGV[8])
local lease_ms, deadline_ms, middle_day = tonumber(ARGV[9]), tonumber(ARGV[10]), tonumber(ARGV[11])
local taken = nil

if deadline_ms > 0 and now_ms > deadline_ms then return {'late', now_s, 0, now_ms, 0} end
sweep(KEYS[4], KEYS[5], now_ms, 6, middle_day)
if id ~= '' then
  if redis.call('HGET', KEYS[4], id) == CLOSED then return {'late', now_s, 0, now_ms, 0} end
  taken = held_by(KEYS[4], id) -- a command that was sent twice counts once
end

local window = read_window(KEYS[1], now_s, letters)
local day = day_at(6, middle_day, now_s) or KEYS[7]
add_amounts(window, now_s, (read_amounts(ARGV[5])))

local refused, retry_ms = '', 0

local function refuse(kind, ms)
  if ms > retry_ms then refused, retry_ms = kind, ms end
end

if requests + tokens > 0 and not taken then
  for _, letter in ipairs(letters) do
    refuse(letter, wait_ms(window[letter], limits[letter], wanted[letter] or 0, now_ms))
  end
  for i = 2, 3 do
    local limit = tonumber(ARGV[i + 4])
    if limit > 0 and requests > 0 then
      redis.call('ZREMRANGEBYSCORE', KEYS[i], '-inf', now_ms)
      -- When a running request will end is not known; one second is a guess.
      if redis.call('ZCARD', KEYS[i]) >= limit then refuse('concurrent', 1000) end
    end
  end
  if budget > 0 and tonumber(redis.call('GET', day) or '0') + tonumber(ARGV[12]) + tokens > budget then
    refuse('daily_tokens', (86400 - now_s % 86400) * 1000)
  end
  if refused == '' then
    charge_window(KEYS[1], now_s, now_s, wanted)
    for i = 2, 3 do
      if tonumber(ARGV[i + 4]) > 0 then
        redis.call('ZADD', KEYS[i], now_ms + lease_ms, member)
        redis.call('PEXPIRE', KEYS[i], lease_ms)
      end
    end
    if budget > 0 then charge_day(day, tokens) end
    if id ~= '' then
      hold(KEYS[4], id, now_s, wanted)
      lease(KEYS[4], KEYS[5], id, now_ms + lease_ms)
    end
    add_amounts(window, now_s, wanted)
  end
end

local spent_today = 0
if budget > 0 then spent_today = tonumber(redis.call('GET', day) or '0') end
return {refused, taken or now_s, retry_ms, now_ms, spent_today, unpack(standing(window, limits, letters, now_s))}
