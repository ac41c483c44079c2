-- What reserve.lua, hold.lua and settle.lua share: reservations that are not settled, and what they hold.
--
-- `open` is a hash: reservation id -> "<bucket second> <tokens> <requests>", or CLOSED for an id that must not be made
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
  local bucket, tokens, requests = string.match(redis.call('HGET', open, id) or '', '^(%d+) (%d+) (%d+)$')
  if bucket then return tonumber(bucket), tonumber(tokens), tonumber(requests) end
end

local function hold(open, id, bucket, tokens, requests)
  redis.call('HSET', open, id, string.format('%.0f %.0f %.0f', bucket, tokens, requests))
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
local function charge_window(window, now_s, bucket, tokens, requests)
  if bucket + SPAN <= now_s then return end
  bucket = math.min(bucket, now_s)
  if tokens ~= 0 then redis.call('HINCRBY', window, 't' .. bucket, tokens) end
  if requests ~= 0 then redis.call('HINCRBY', window, 'r' .. bucket, requests) end
  redis.call('EXPIRE', window, SPAN + 1)
end

-- Give back what is in a bucket.
local function refund_window(window, bucket, tokens, requests)
  if tokens ~= 0 and redis.call('HEXISTS', window, 't' .. bucket) == 1 then
    redis.call('HINCRBY', window, 't' .. bucket, -tokens)
  end
  if requests ~= 0 and redis.call('HEXISTS', window, 'r' .. bucket) == 1 then
    redis.call('HINCRBY', window, 'r' .. bucket, -requests)
  end
end

-- Give the days back what reservations hold whose lease has ended.
local function sweep(open, leases, now_ms, first, middle_day)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms, 'LIMIT', 0, SWEPT_AT_ONCE)) do
    local bucket, tokens = held_by(open, id)
    if bucket then charge_day(day_at(first, middle_day, bucket), -tokens) end
    forget(open, leases, id)
  end
end
