-- Find the session of a request that names none, or begin one.
--
-- A request continues a session if what comes before its last answer began a turn of that session, and of no other
-- that is remembered, and the answer is the one that the turn got. Where a prompt was forgotten or not recorded, another
-- conversation may have begun with any prompt, so that no session is continued.
--
-- KEYS  contents, expiries, prompts, prompts by the time they were seen: all of one API key
-- ARGV  1 id of a new session  2 digest of the prompt, or nothing  3 digest of what came before the last answer, or
--       nothing  4 digest with that answer  5 time to live in ms  6 for how long prompts are remembered, in ms
--       7 how many prompts are  8 most sessions  9 1 if a prompt was not recorded since the last call, else 0
-- Returns  {'new' | 'known', id}

local now_ms = now()
forget_expired(KEYS[1], KEYS[2], KEYS[3], now_ms)
local id, how = ARGV[1], 'new'
if ARGV[9] == '1' then redis.call('HSET', KEYS[3], '?', now_ms) end
local gap = tonumber(redis.call('HGET', KEYS[3], '?') or 0)
local complete = gap == 0 or gap + tonumber(ARGV[6]) <= now_ms
local before = complete and ARGV[3] ~= '' and redis.call('HGET', KEYS[3], ARGV[3])
if before then
  local known, answered = string.match(before, '^(%S+) (%S+)$')
  if known and answered == ARGV[4] and redis.call('ZSCORE', KEYS[2], known) then id, how = known, 'known' end
end
redis.call('ZADD', KEYS[2], now_ms + tonumber(ARGV[5]), id)
while redis.call('ZCARD', KEYS[2]) > tonumber(ARGV[8]) do
  forget(KEYS[1], KEYS[2], KEYS[3], redis.call('ZRANGE', KEYS[2], 0, 0)[1])
end
if ARGV[2] ~= '' then
  local seen = redis.call('HGET', KEYS[3], ARGV[2])
  local same = not seen or string.match(seen, '^%S+') == id
  redis.call('HSET', KEYS[3], ARGV[2], same and id or '*')
  redis.call('ZADD', KEYS[4], now_ms, ARGV[2])
  while redis.call('ZCARD', KEYS[4]) > tonumber(ARGV[7]) do
    redis.call('HDEL', KEYS[3], redis.call('ZPOPMIN', KEYS[4])[1])
    redis.call('HSET', KEYS[3], '?', now_ms)
  end
end
for i = 1, 2 do redis.call('PEXPIRE', KEYS[i], ARGV[5]) end
for i = 3, 4 do redis.call('PEXPIRE', KEYS[i], ARGV[6]) end
return {how, id}
