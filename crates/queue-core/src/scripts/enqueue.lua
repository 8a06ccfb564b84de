-- Submits jobs, many in one call.
-- ARGV: most queued jobs per user, largest payload in bytes, then for each job:
--   id, user, delay in ms, number of fields and values, fields and values in turn
-- Reply: for each job 'queued', 'exists' (the id was submitted before: nothing was written), {'full', limit},
--   {'too_large', bytes}, or {'refused', reason}
local most, largest = tonumber(ARGV[1]), tonumber(ARGV[2])
local replies, wakes = {}, {}
local i = 3
while i <= #ARGV do
  local id, user, delay, m = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3])
  local fields = {unpack(ARGV, i + 4, i + 3 + m)}
  i = i + 4 + m
  local queue, size, reply = K.queue(user), 0, nil
  for f = 2, #fields, 2 do size = size + #fields[f] end
  local length = try('LLEN', queue)
  if redis.call('EXISTS', K.job(id)) == 1 then
    reply = 'exists'
  elseif not length then
    reply = {'refused', 'the key of the queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list'}
  elseif length >= most then
    reply = {'full', most}
  elseif size > largest then
    reply = {'too_large', size}
  else
    redis.call('HSET', K.job(id), 'user', user, 'status', delay > 0 and 'scheduled' or 'pending', 'created_at', now,
      'updated_at', now, 'enqueued_at', now, unpack(fields))
    if delay > 0 then
      redis.call('ZADD', K.due(), int(now_ms + delay), id)
      publish(user, id, 'scheduled')
    else
      redis.call('LPUSH', queue, id)
      try('SADD', K.queued_users(), user)
      publish(user, id, 'pending')
      local pool, new = place(user)
      if new then wakes[pool] = true end
    end
    reply = 'queued'
  end
  replies[#replies + 1] = reply
end
for pool in pairs(wakes) do wake_one(pool) end
return replies
