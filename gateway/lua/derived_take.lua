-- Hand out a derived session, to make it an ordinary one, to show it or to delete it.
--
-- KEYS  contents, expiries, prompts: all of one API key
-- ARGV  1 id  2 whether it is to be forgotten here (0 or 1)
-- Returns  {1 if there is one, what was said in it or ''}

local now_ms = now()
forget_expired(KEYS[1], KEYS[2], KEYS[3], now_ms)
local content = redis.call('HGET', KEYS[1], ARGV[1])
local there = redis.call('ZSCORE', KEYS[2], ARGV[1])
if ARGV[2] == '1' then forget(KEYS[1], KEYS[2], KEYS[3], ARGV[1]) end
return {there and 1 or 0, content or ''}
