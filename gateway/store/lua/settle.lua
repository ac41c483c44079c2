-- Close one generation: bring the limits to what it really spent, free its lease, and write the ledger. Exactly once:
-- entries of one gateway process carry rising numbers, and a number that was applied before is ignored.
--
-- KEYS  1 window  2 running (model)  3 running (key)  4 open reservations  5 their leases  6 to 8 budgets of three days
--       9 applied  10 when applied  11 usage  12 usage index: all of one API key
-- ARGV  1 gateway process  2 entry number  3 number of the entry that must have been applied before, 0 for any
--       4 lease member to free, or ''  5 reservation id, or ''  6 bucket second, 0 if nothing was reserved
--       7 tokens to give back of those that were reserved  8 tokens spent  9 requests that count
--       10 whether the reservation's own command may still arrive (0 or 1)
--       11 requests per minute  12 tokens per minute  13 tokens per day, 0 for none
--       14 number of the middle one of the three days  15 usage index member  16 days to keep usage
--       17 oldest date that is kept  then pairs of usage field and increment
-- Returns  {1 if applied, 0 if it was before, -1 if the entry before it is missing, then the remaining requests,
--          remaining tokens, reset requests, reset tokens}

local APPLIED_S = 30 * 86400
local MOST_FIELDS = 64
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)
local process, number, id, bucket = ARGV[1], tonumber(ARGV[2]), ARGV[5], tonumber(ARGV[6])
local refund, spent, requests, budget = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[13])
local middle_day = tonumber(ARGV[14])

-- A reservation that this server has is brought down to what was spent. One that it does not have, because it was made
-- without this server or given back, is counted now.
local function close_reservation()
  local held_at, tokens, held_requests = held_by(KEYS[4], id)
  if not held_at then
    if bucket > 0 then
      charge_window(KEYS[1], now_s, bucket, spent, requests)
      if budget > 0 then charge_day(day_at(6, middle_day, bucket), spent) end
    end
  else
    tokens, held_requests = tokens - refund - spent, math.max(0, held_requests - requests)
    refund_window(KEYS[1], held_at, refund, tokens <= 0 and held_requests or 0)
    if budget > 0 then charge_day(day_at(6, middle_day, held_at), -refund) end
    if tokens > 0 then return hold(KEYS[4], id, held_at, tokens, held_requests) end
    forget(KEYS[4], KEYS[5], id)
  end
  if ARGV[10] == '1' then shut(KEYS[4], KEYS[5], id, now_ms) end
end

local function note_applied()
  redis.call('HSET', KEYS[9], process, number)
  redis.call('ZADD', KEYS[10], now_s, process)
  for _, old in ipairs(redis.call('ZRANGEBYSCORE', KEYS[10], '-inf', now_s - APPLIED_S, 'LIMIT', 0, 8)) do
    redis.call('HDEL', KEYS[9], old)
    redis.call('ZREM', KEYS[10], old)
  end
  redis.call('EXPIRE', KEYS[9], APPLIED_S)
  redis.call('EXPIRE', KEYS[10], APPLIED_S)
end

local function write_usage()
  for i = 18, #ARGV, 2 do
    local field = ARGV[i]
    if string.sub(field, 1, 6) == 'error:' and redis.call('HLEN', KEYS[11]) >= MOST_FIELDS
      and redis.call('HEXISTS', KEYS[11], field) == 0 then
      field = 'error:other'
    end
    if ARGV[i + 1] ~= '0' then redis.call('HINCRBY', KEYS[11], field, ARGV[i + 1]) end
  end
  local keep_s = tonumber(ARGV[16]) * 86400
  redis.call('EXPIRE', KEYS[11], keep_s)
  if redis.call('SADD', KEYS[12], ARGV[15]) == 1 then
    for _, day in ipairs(redis.call('SMEMBERS', KEYS[12])) do
      if string.sub(day, 1, 10) < ARGV[17] then redis.call('SREM', KEYS[12], day) end
    end
  end
  redis.call('EXPIRE', KEYS[12], keep_s)
end

local applied = 0
local before = tonumber(redis.call('HGET', KEYS[9], process) or '0')
if before < tonumber(ARGV[3]) then
  applied = -1
elseif before < number then
  applied = 1
  note_applied()
  if ARGV[4] ~= '' then
    redis.call('ZREM', KEYS[2], ARGV[4])
    redis.call('ZREM', KEYS[3], ARGV[4])
  end
  if id ~= '' then
    close_reservation()
  elseif bucket > 0 and refund ~= 0 then
    refund_window(KEYS[1], bucket, refund, 0)
    if budget > 0 then charge_day(day_at(6, middle_day, bucket), -refund) end
  end
  write_usage()
end

local window = read_window(KEYS[1], now_s)
return {applied, standing(window, tonumber(ARGV[11]), tonumber(ARGV[12]), now_s)}
