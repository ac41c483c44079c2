-- Take a member out of a key's account.
--
-- KEYS  members by expiry in ms, bytes by member ('' is the sum): both of one API key
-- ARGV  1 member  2 the expiry that it had when it was to go, or nothing: one that was used since then stays
-- Returns  1 if it was there

local score = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not score or (ARGV[2] ~= '' and tonumber(score) ~= tonumber(ARGV[2])) then return 0 end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HINCRBY', KEYS[2], '', -tonumber(redis.call('HGET', KEYS[2], ARGV[1]) or '0'))
redis.call('HDEL', KEYS[2], ARGV[1])
if redis.call('ZCARD', KEYS[1]) == 0 then redis.call('DEL', KEYS[1], KEYS[2]) end
return 1
