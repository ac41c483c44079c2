-- Renew the leases of reservations and of running requests, and restore those that this server may not know: made by the
-- gateway alone while the server was away, or given back when their leases had ended.
--
-- KEYS  1 window  2 running (model)  3 running (key)  4 open reservations  5 their leases  6 to 8 budgets of three days
-- ARGV  1 lease in ms  2 number of the middle one of the three days  3 tokens per day, 0 for none
--       4 concurrent (model), 0 for none  5 concurrent (key), 0 for none
--       6 whether what is not known is to be restored (0 or 1)  7 number of reservations
--       then id, bucket second and amounts of each, then the members of running requests
-- Returns  1

local time = redis.call('TIME')
local now_s = tonumber(time[1])
local now_ms = now_s * 1000 + math.floor(tonumber(time[2]) / 1000)
local until_ms, restore = now_ms + tonumber(ARGV[1]), ARGV[6] == '1'
local last = 7 + 3 * tonumber(ARGV[7])

for i = 8, last, 3 do
  local id, bucket, amounts = ARGV[i], tonumber(ARGV[i + 1]), read_amounts(ARGV[i + 2])
  if held_by(KEYS[4], id) then
    lease(KEYS[4], KEYS[5], id, until_ms)
  elseif restore and redis.call('HEXISTS', KEYS[4], id) == 0 then
    hold(KEYS[4], id, bucket, amounts)
    lease(KEYS[4], KEYS[5], id, until_ms)
    if bucket > now_s then bucket = now_s end
    charge_window(KEYS[1], now_s, bucket, amounts)
    if tonumber(ARGV[3]) > 0 then charge_day(day_at(6, tonumber(ARGV[2]), bucket), amounts.t or 0) end
  end
end
for i = last + 1, #ARGV do
  for k = 2, 3 do
    if tonumber(ARGV[k + 2]) > 0 then
      if restore then redis.call('ZADD', KEYS[k], until_ms, ARGV[i])
      else redis.call('ZADD', KEYS[k], 'XX', until_ms, ARGV[i]) end
      redis.call('PEXPIRE', KEYS[k], tonumber(ARGV[1]))
    end
  end
end
return 1
