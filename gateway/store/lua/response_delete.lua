-- Forget a response that is not being made.
--
-- KEYS  response, state, turn, lease, mark of a deletion, then those that may hold pieces
-- ARGV  1 tenant  2 for how long the mark keeps a gateway that took longer than its lease from bringing it back, in s
--       3... statuses of a response that is being made
-- Returns  {'absent' | 'running' | 'deleted', API key that paid for it or ''}

if redis.call('HGET', KEYS[2], 'tenant') ~= ARGV[1] then return {'absent', ''} end
local state = redis.call('HMGET', KEYS[2], 'status', 'payer')
for i = 3, #ARGV do
  if state[1] == ARGV[i] then
    if redis.call('EXISTS', KEYS[4]) == 1 then return {'running', ''} end
    redis.call('SET', KEYS[5], '', 'EX', ARGV[2])
  end
end
for i = 1, #KEYS do
  if i ~= 5 then redis.call('DEL', KEYS[i]) end
end
return {'deleted', state[2] or ''}
