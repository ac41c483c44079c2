-- What session_open.lua and session_read.lua share: the reading of turns, newest first, in pieces.
--
-- Turns are members of a sorted set under their numbers: JSON that begins with the number. A turn too large for one
-- member is several, "~<number>:<place>/<count>:<text>", in order of their places.

-- Return members at or below a score, newest first, each with its score, as long as they take at most `most` bytes;
-- one in any case. `skip` of those at the score itself are known already. Also returns 1 if there are more, else 0.
local function read_turns(key, score, skip, most)
  local found, bytes = {}, 0
  while true do
    local next = redis.call('ZREVRANGEBYSCORE', key, score, '-inf', 'WITHSCORES', 'LIMIT', skip, 1)
    if not next[1] then return found, 0 end
    bytes = bytes + #next[1]
    if bytes > most and #found > 0 then return found, 1 end
    table.insert(found, next[1])
    table.insert(found, next[2])
    if next[2] ~= score then score, skip = next[2], 0 end
    skip = skip + 1
  end
end
