-- What reserve.lua, hold.lua and settle.lua share: reservations that are not settled, and what they hold.
--
-- `open` is a hash: reservation id -> "<bucket second> r<requests> t<tokens>", or CLOSED for an id that must not be made
-- any more. `leases` is a sorted set of the same ids by the ms at which they end. A reservation whose gateway is gone is
-- given back when its lease has ended: its window has forgotten it by then, the day has not.

local CLOSED = 'closed'
local CLOSED_MS = 120000
local KEEP_S = 2 * 86400
local SWEPT_AT_ONCE = 64

-- The key of the day that a second falls on, of three days that begin with KEYS[first]; nil if it is another day.
local function day_at(first, middle_day, second)
  local offset = math.floor(second / 86400) - middle_day
  if offset < -1 or offset > 1 then return nil end
  return KEYS[first + 1 + offset]
end

local function held_by(open, id)
  local known = redis.call('HGET', open, id) or ''
  local bucket, rest = string.match(known, '^(%d+) (.*)$')
  if not bucket then return nil end
  local tokens, requests = string.match(rest, '^(%d+) (%d+)$') -- as older gateways write it
  if tokens then return tonumber(bucket), {t = tonumber(tokens), r = tonumber(requests)} end
  return tonumber(bucket), (read_amounts(rest))
end

local function hold(open, id, bucket, amounts)
  local text = string.format('%.0f', bucket)
  for letter, amount in pairs(amounts) do text = text .. string.format(' %s%.0f', letter, amount) end
  redis.call('HSET', open, id, text)
end

local function lease(open, leases, id, until_ms)
  redis.call('ZADD', leases, until_ms, id)
  redis.call('EXPIRE', open, KEEP_S)
  redis.call('EXPIRE', leases, KEEP_S)
end

local function forget(open, leases, id)
  redis.call('HDEL', open, id)
  redis.call('ZREM', leases, id)
end

-- Make sure that a reservation is not made any more, should its command still be on the way.
local function shut(open, leases, id, now_ms)
  redis.call('HSET', open, id, CLOSED)
  lease(open, leases, id, now_ms + CLOSED_MS)
end

local function charge_day(day, tokens)
  if not day or tokens == 0 then return end
  if tokens < 0 and redis.call('EXISTS', day) == 0 then return end
  redis.call('INCRBY', day, string.format('%.0f', tokens))
  redis.call('EXPIRE', day, KEEP_S)
end

-- Count what is in no bucket yet, in the bucket that it belongs to.
local function charge_window(window, now_s, bucket, amounts)
  if bucket + SPAN <= now_s then return end
  bucket = math.min(bucket, now_s)
  for letter, amount in pairs(amounts) do
    if amount ~= 0 then redis.call('HINCRBY', window, letter .. bucket, amount) end
  end
  redis.call('EXPIRE', window, SPAN + 1)
end

-- Give back what is in a bucket.
local function refund_window(window, bucket, amounts)
  for letter, amount in pairs(amounts) do
    if amount ~= 0 and redis.call('HEXISTS', window, letter .. bucket) == 1 then
      redis.call('HINCRBY', window, letter .. bucket, -amount)
    end
  end
end

-- Give the days back what reservations hold whose lease has ended.
local function sweep(open, leases, now_ms, first, middle_day)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms, 'LIMIT', 0, SWEPT_AT_ONCE)) do
    local bucket, amounts = held_by(open, id)
    if bucket then charge_day(day_at(first, middle_day, bucket), -(amounts.t or 0)) end
    forget(open, leases, id)
  end
end
