-- Tells where lines stand; changes nothing.
-- ARGV: lines
-- Reply: for each {the pool of its head or nil if it has none that can run, how many ids it has, when its head was submitted or
--   nil if that does not say}
local replies = {}
for _, line in ipairs(ARGV) do
  local length, pool, created_at = 0, nil, nil
  if parts_of(line) then
    for _, band in ipairs({'high', 'low', ''}) do length = length + (try('LLEN', queue_of(line, band)) or 0) end
    local id = try('LINDEX', head_queue(line), -1)
    if id then
      local verdict, detail = look(id, line)
      if verdict == 'ready' then pool = detail end
      -- A task in the list of foreign producers that nobody has noticed yet.
      if verdict == 'moves' then pool = parts_of(detail) end
      local size = pool and try('HSTRLEN', K.job(id), 'created_at') or 0
      created_at = size > 0 and size <= 64 and redis.call('HGET', K.job(id), 'created_at')
    end
  end
  replies[#replies + 1] = {pool or false, length, created_at or false}
end
return replies
