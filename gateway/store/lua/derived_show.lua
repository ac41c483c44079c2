-- Show a derived session.
--
-- KEYS  contents, expiries: both of one API key
-- ARGV  1 id
-- Returns  {1 if there is one, what was said in it or ''}

local until_ms = redis.call('ZSCORE', KEYS[2], ARGV[1])
if not until_ms or tonumber(until_ms) <= now() then return {0, ''} end
return {1, redis.call('HGET', KEYS[1], ARGV[1]) or ''}
