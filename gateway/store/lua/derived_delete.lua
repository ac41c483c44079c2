-- Forget a derived session: it was deleted, or is an ordinary one by now.
--
-- KEYS  contents, expiries, prompts: all of one API key
-- ARGV  1 id
-- Returns  1 if there was one

forget_expired(KEYS[1], KEYS[2], KEYS[3], now())
return forget(KEYS[1], KEYS[2], KEYS[3], ARGV[1])
