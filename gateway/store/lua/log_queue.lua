-- What log_open.lua and log_renew.lua share: the reading of a client's jobs, in pieces.

-- Return the jobs behind the first `known`, as many as take at most `most` bytes, one in any case; and 1 if there are
-- more, else 0.
local function read_jobs(key, known, most)
  local jobs, bytes = {}, 0
  while true do
    local job = redis.call('LINDEX', key, known + #jobs)
    if not job then return jobs, 0 end
    bytes = bytes + #job
    if bytes > most and #jobs > 0 then return jobs, 1 end
    table.insert(jobs, job)
  end
end
