-- What reserve.lua, hold.lua and settle.lua share: amounts, and the sliding window of one-second buckets.
--
-- Amounts of several dimensions are written as "r1 t500": 1 request and 500 tokens, each dimension by one letter. The
-- scripts know two of them: r are requests, t are tokens. All others are only counted and limited.
--
-- A window is a hash of fields "r<second>", "t<second>" and so on, seconds being the server's own time. A bucket counts
-- until the second 61 after its own: a request at its very end is then 60 s old, so no 60 s ever hold more than the
-- limit. Buckets that are further ahead than that were made before a clock was set back, or by a server whose clock was
-- ahead. They are dropped, because they would lock the key out until then.

local SPAN = 61

-- Returns letter -> amount, and the letters in their order.
local function read_amounts(text)
  local amounts, letters = {}, {}
  for letter, amount in string.gmatch(text, '(%l)(%-?%d+)') do
    amounts[letter] = tonumber(amount)
    table.insert(letters, letter)
  end
  return amounts, letters
end

local function read_window(key, now_s, letters)
  local window = {}
  for _, letter in ipairs(letters) do window[letter] = {used = 0, buckets = {}} end
  local flat = redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    local letter, second = string.sub(flat[i], 1, 1), tonumber(string.sub(flat[i], 2))
    if second + SPAN <= now_s or second - SPAN > now_s then
      redis.call('HDEL', key, flat[i])
    elseif window[letter] then
      local amount = tonumber(flat[i + 1])
      window[letter].used = window[letter].used + amount
      table.insert(window[letter].buckets, {second, amount})
    end
  end
  return window
end

-- Count amounts of a second in a window that was read.
local function add_amounts(window, second, amounts)
  for letter, series in pairs(window) do
    local amount = amounts[letter] or 0
    series.used = series.used + amount
    table.insert(series.buckets, {second, amount})
  end
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

-- The figures of the X-RateLimit headers: the remaining amount and the reset of each dimension, in order.
local function standing(window, limits, letters, now_s)
  local figures = {}
  for _, letter in ipairs(letters) do
    table.insert(figures, limits[letter] - window[letter].used)
    table.insert(figures, reset_at(window[letter], now_s))
  end
  return figures
end
