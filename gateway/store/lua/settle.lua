-- Close one generation: bring the limits to what it really spent, free its lease, and write the ledger. Exactly once:
-- entries of one gateway process carry rising numbers, and a number that was applied before is ignored.
--
-- KEYS  1 window  2 running (model)  3 running (key)  4 open reservations  5 their leases  6 to 8 budgets of three days
--       9 applied  10 when applied  11 usage  12 usage index: all of one API key
-- ARGV  1 gateway process  2 entry number  3 number of the entry that must have been applied before, 0 for any
--       4 lease member to free, or ''  5 reservation id, or ''  6 bucket second, 0 if nothing was reserved
--       7 amounts to give back of those that were reserved  8 amounts that count
--       9 whether the reservation's own command may still arrive (0 or 1)
--       10 limits per minute of all dimensions that have one  11 tokens per day, 0 for no limit
--       12 number of the middle one of the three days  13 usage index member  14 days to keep usage
--       15 oldest date that is kept  then pairs of usage field and increment
-- Returns  {1 if applied, 0 if it was before, -1 if the entry before it is missing, then the remaining amount and the
--          reset of each dimension}

local APPLIED_S = 30 * 86400
local MOST_FIELDS = 64
local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)
local process, number, id, bucket = ARGV[1], tonumber(ARGV[2]), ARGV[5], tonumber(ARGV[6])
local refund, counted, budget = read_amounts(ARGV[7]), read_amounts(ARGV[8]), tonumber(ARGV[11])
local limits, letters = read_amounts(ARGV[10])
local middle_day = tonumber(ARGV[12])

-- A reservation that this server has is brought down to what counts. One that it does not have, because it was made
-- without this server or given back, is counted now.
local function close_reservation()
  local held_at, left = held_by(KEYS[4], id)
  if not held_at then
    if bucket > 0 then
      charge_window(KEYS[1], now_s, bucket, counted)
      if budget > 0 then charge_day(day_at(6, middle_day, bucket), counted.t or 0) end
    end
  else
    if budget > 0 then charge_day(day_at(6, middle_day, held_at), -(refund.t or 0)) end
    for letter, amount in pairs(left) do
      left[letter] = math.max(0, amount - (refund[letter] or 0) - (counted[letter] or 0))
    end
    local open = (left.t or 0) > 0
    for letter, amount in pairs(left) do
      if not open then refund[letter] = (refund[letter] or 0) + amount end
    end
    refund_window(KEYS[1], held_at, refund)
    if open then return hold(KEYS[4], id, held_at, left) end
    forget(KEYS[4], KEYS[5], id)
  end
  if ARGV[9] == '1' then shut(KEYS[4], KEYS[5], id, now_ms) end
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
  for i = 16, #ARGV, 2 do
    local field = ARGV[i]
    if string.sub(field, 1, 6) == 'error:' and redis.call('HLEN', KEYS[11]) >= MOST_FIELDS
      and redis.call('HEXISTS', KEYS[11], field) == 0 then
      field = 'error:other'
    end
    if ARGV[i + 1] ~= '0' then redis.call('HINCRBY', KEYS[11], field, ARGV[i + 1]) end
  end
  local keep_s = tonumber(ARGV[14]) * 86400
  redis.call('EXPIRE', KEYS[11], keep_s)
  if redis.call('SADD', KEYS[12], ARGV[13]) == 1 then
    for _, day in ipairs(redis.call('SMEMBERS', KEYS[12])) do
      if string.sub(day, 1, 10) < ARGV[15] then redis.call('SREM', KEYS[12], day) end
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
  elseif bucket > 0 then
    refund_window(KEYS[1], bucket, refund)
    if budget > 0 then charge_day(day_at(6, middle_day, bucket), -(refund.t or 0)) end
  end
  write_usage()
end

local window = read_window(KEYS[1], now_s, letters)
return {applied, unpack(standing(window, limits, letters, now_s))}
