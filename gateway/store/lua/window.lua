-- What reserve.lua, hold.lua and settle.lua share: the sliding window of one-second buckets.
--
-- A window is a hash of fields "r<second>" (requests) and "t<second>" (tokens), seconds being the server's own time.
-- A bucket counts until the second 61 after its own: a request at its very end is then 60 s old, so no 60 s that
-- anyone could pick ever hold more than the limit. Buckets that are further ahead than that are of a clock that was set
-- back since, or of a server whose clock was ahead; they are dropped, or they would lock the key out until then.

local SPAN = 61

local function read_window(key, now_s)
  local window = {r = {used = 0, buckets = {}}, t = {used = 0, buckets = {}}}
  local flat = redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    local kind, second = string.sub(flat[i], 1, 1), tonumber(string.sub(flat[i], 2))
    if second + SPAN <= now_s or second - SPAN > now_s then
      redis.call('HDEL', key, flat[i])
    else
      local amount = tonumber(flat[i + 1])
      window[kind].used = window[kind].used + amount
      table.insert(window[kind].buckets, {second, amount})
    end
  end
  return window
end

-- Unix second at which nothing of a series counts any more.
local function reset_at(series, now_s)
  local latest = now_s
  for _, bucket in ipairs(series.buckets) do
    if bucket[2] > 0 and bucket[1] + SPAN > latest then latest = bucket[1] + SPAN end
  end
  return latest
end

-- Milliseconds until `wanted` more fit under `limit`, as the oldest buckets leave.
local function wait_ms(series, limit, wanted, now_ms)
  local over = series.used + wanted - limit
  if over <= 0 then return 0 end
  table.sort(series.buckets, function(a, b) return a[1] < b[1] end)
  for _, bucket in ipairs(series.buckets) do
    over = over - bucket[2]
    if over <= 0 then return (bucket[1] + SPAN) * 1000 - now_ms end
  end
  return SPAN * 1000
end

-- The figures behind the six X-RateLimit headers.
local function standing(window, limit_requests, limit_tokens, now_s)
  return limit_requests - window.r.used, limit_tokens - window.t.used,
    reset_at(window.r, now_s), reset_at(window.t, now_s)
end
