-- Submits jobs, many in one call.
-- ARGV: most queued jobs per user, largest payload in bytes, 1 if replicas are to confirm it or 0, then for each job:
--   id, user, delay in ms, earliest time in ms (0 for none), number of fields and values, fields and values in turn
-- Reply: for each job 'queued', 'exists' (the id was submitted before: nothing was written), {'full', limit},
--   {'too_large', bytes}, {'no_room', bytes of memory used, bytes above which nothing new is accepted}, or {'refused', reason}
local most, largest = tonumber(ARGV[1]), tonumber(ARGV[2])
-- The leader's word that memory is nearly full.
local used, mark = string.match(redis.call('GET', K.full()) or '', '^(%d+) (%d+)$')
local replies, wakes = {}, {}
-- A replica confirms what this very connection wrote: that a job exists was written by another, before this.
if ARGV[3] == '1' then redis.call('SET', K.confirming(), now, 'PX', 60000) end
local i = 4
while i <= #ARGV do
  local id, user, m = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 4])
  local delay = math.max(tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]) - now_ms)
  local fields = {unpack(ARGV, i + 5, i + 4 + m)}
  i = i + 5 + m
  local queue, size, names, reply = K.queue(user), 0, 0, nil
  for f = 2, #fields, 2 do
    size = size + #fields[f]
    names = names + #fields[f - 1]
  end
  local length = try('LLEN', queue)
  if redis.call('EXISTS', K.job(id)) == 1 then
    reply = 'exists'
  elseif not length then
    reply = {'refused', 'the key of the queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list'}
  elseif length + tonumber(redis.call('HGET', K.delays(), user) or 0) >= most then
    reply = {'full', most}
  elseif size > largest or size + names > MAX_PAYLOAD then
    reply = {'too_large', size}
  elseif used then
    reply = {'no_room', used, mark}
  else
    redis.call('HSET', K.job(id), 'user', user, 'status', delay > 0 and 'scheduled' or 'pending', 'created_at', now,
      'updated_at', now, 'enqueued_at', now, unpack(fields))
    -- Others may have removed the hash of a job of this id that was on the schedule. Not before the hash is written: memory
    -- is checked at the first write only.
    unschedule(id)
    if delay > 0 then
      redis.call('ZADD', K.due(), int(now_ms + delay), id)
      redis.call('HSET', K.delayed(), id, user)
      redis.call('HINCRBY', K.delays(), user, 1)
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
