-- What the derived_*.lua share: forgetting derived sessions of one API key.
--
-- All of a key's derived sessions are in one hash, so that one script can hold them to a common bound: id -> what was
-- said, as JSON. `prompts` maps the digest of each prompt that began a turn to the session it belongs to, "*" where it
-- was more than one. It holds the bytes of all sessions under '', and under '?' when the newest prompt that is missing
-- from it was forgotten or not recorded.

local function forget(contents, expiries, prompts, id)
  local size = redis.call('HSTRLEN', contents, id)
  if size > 0 then redis.call('HINCRBY', prompts, '', -size) end
  redis.call('HDEL', contents, id)
  return redis.call('ZREM', expiries, id)
end

local function now()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

local function forget_expired(contents, expiries, prompts, now_ms)
  if redis.call('EXISTS', contents) == 0 then redis.call('HDEL', prompts, '') end
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', expiries, '-inf', now_ms)) do
    forget(contents, expiries, prompts, id)
  end
end
