-- Remove a session or a response to make room for others of the API key that pays for it.
--
-- The key's account may name one that was deleted meanwhile, whose id may be another tenant's session by now.
--
-- KEYS  1 hash that names who pays  2... the rest of it
-- ARGV  1 API key whose account names it
-- Returns  1 if it was removed

if redis.call('HGET', KEYS[1], 'payer') ~= ARGV[1] then return 0 end
redis.call('DEL', unpack(KEYS))
return 1
