-- Starts new runs of jobs that have ended.
-- ARGV: for each job: id, the `query` field as the caller saw it, '=' and the password of the connection that the
--   job carries ('' for none), number of fields and values, fields and values in turn: what the new run starts from, its status among them
-- Reply: for each job 'queued', {'not_over', status}, 'changed' (its `query` is another by now: look again), 'missing',
--   'no_password' (it carried a connection, whose password was removed at its end), or {'refused', reason}
local replies = {}
local i = 1
while i <= #ARGV do
  local id, seen, pass, m = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local fields = {unpack(ARGV, i + 4, i + 3 + m)}
  i = i + 4 + m
  local job, reply = K.job(id), nil
  if redis.call('TYPE', job).ok ~= 'hash' then
    reply = 'missing'
  else
    local h = redis.call('HMGET', job, 'status', 'fallback_status', 'query', 'user', 'host', 'pass', 'database')
    local user = h[4] or ''
    if redis.call('HEXISTS', K.claims(), id) == 1 then
      reply = {'not_over', 'running'}
    elseif not is_over(h[1], h[2]) then
      reply = {'not_over', h[1] or ''}
    elseif (h[3] or '') ~= seen then
      reply = 'changed'
    elseif not is_user(user) then
      reply = {'refused', 'it names no valid user'}
    elseif not try('LLEN', K.queue(user)) then
      reply = {'refused', 'the key of the queue holds a ' .. redis.call('TYPE', K.queue(user)).ok .. ', not a list'}
    elseif h[5] and not h[7] and not h[6] and pass == '' then
      reply = 'no_password'
    else
      local run = (redis.call('HSTRLEN', job, 'run') <= 9 and tonumber(redis.call('HGET', job, 'run') or 1) or 1) + 1
      redis.call('HDEL', job, 'started_at', 'ended_at', 'failed_reason', 'results', 'trace', 'attempts', 'unclean', 'lost_worker',
        'cancel_requested_at')
      if pass ~= '' then redis.call('HSET', job, 'pass', string.sub(pass, 2)) end
      redis.call('HSET', job, 'run', int(run), 'updated_at', now, unpack(fields))
      redis.call('PERSIST', job)
      forget({id})
      -- Whoever ended it by its hash alone while it waited for its time left it on the schedule.
      unschedule(id)
      -- A copy that was queued before is the same job: it has one place.
      if redis.call('LLEN', K.queue(user)) <= 1000 then redis.call('LREM', K.queue(user), 0, id) end
      redis.call('LPUSH', K.queue(user), id)
      try('SADD', K.queued_users(), user)
      publish(user, id, 'pending')
      local pool, new = place(user)
      if new then wake_one(pool) end
      reply = 'queued'
    end
  end
  replies[#replies + 1] = reply
end
return replies
