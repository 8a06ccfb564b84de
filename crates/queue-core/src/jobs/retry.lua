-- Starts new runs of jobs that have ended.
-- ARGV: for each job: id, the `query` field as the caller saw it, '=' and the password of the connection that the
--   job carries ('' for none), number of fields and values, fields and values in turn: what the new run starts from, its status among them
-- Reply: for each job 'queued', {'not_over', status}, 'changed' (its `query` is another by now: look again), 'missing',
--   'no_password' (it carried a connection, whose password was removed at its end), or {'refused', reason}
local replies = {}
local i = 1
while i <= #ARGV do
  local id, seen, pass, m = ARGV[i], ARGV[i + 1], ARGV[i + 2], count_in(ARGV[i + 3])
  local fields = {unpack(ARGV, i + 4, i + 3 + m)}
  i = i + 4 + m
  local job, reply = K.job(id), nil
  if redis.call('TYPE', job).ok ~= 'hash' then
    reply = 'missing'
  else
    local h = redis.call('HMGET', job, 'status', 'fallback_status', 'query', 'user', 'host', 'pass', 'database',
      'unique', 'unique_scope')
    local user = h[4] or ''
    local line = line_by_hash(id, user)
    local queue = queue_of(line, band_of(id))
    local unique = h[8] and h[8] ~= '' and #h[8] <= MAX_UNIQUE and (h[9] == 'queued' or h[9] == 'done') and h[8]
    if redis.call('HEXISTS', K.claims(), id) == 1 then
      reply = {'not_over', 'running'}
    elseif not is_over(h[1], h[2]) then
      reply = {'not_over', h[1] or ''}
    elseif (h[3] or '') ~= seen then
      reply = 'changed'
    elseif is_batch(id) then
      reply = {'refused', 'it is a batch, whose rows have ended: submit those that failed as another one'}
    elseif not is_user(user) then
      reply = {'refused', 'it names no valid user'}
    elseif not try('LLEN', queue) then
      reply = {'refused', 'the key of the queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list'}
    elseif h[5] and not h[7] and not h[6] and pass == '' then
      reply = 'no_password'
    elseif unique and not take_unique(unique, h[9], 0, id) then
      reply = {'refused', 'another job holds its unique key: ' .. holder_of(unique)}
    else
      local run = (redis.call('HSTRLEN', job, 'run') <= 9 and tonumber(redis.call('HGET', job, 'run') or 1) or 1) + 1
      -- Until it says that it waits, it is an ended job that has no lifetime, and gets one again where this breaks off.
      redis.call('PERSIST', job)
      forget({id})
      -- Whoever ended it by its hash alone while it waited for its time left it on the schedule.
      unschedule(id)
      redis.call('HDEL', job, 'started_at', 'ended_at', 'failed_reason', 'results', 'trace', 'attempts', 'unclean', 'lost_worker',
        'cancel_requested_at', 'result', 'result_encoding', 'result_object', 'result_bytes', 'messages', 'files', 'progress', 'log')
      if pass ~= '' then redis.call('HSET', job, 'pass', string.sub(pass, 2)) end
      redis.call('HSET', job, 'run', int(run), 'updated_at', now(), unpack(fields))
      -- A copy that was queued before is the same job: it has one place.
      if redis.call('LLEN', queue) <= 1000 then redis.call('LREM', queue, 0, id) end
      redis.call('LPUSH', queue, id)
      index(line)
      publish(user, id, 'pending')
      place_and_wake(line)
      reply = 'queued'
    end
  end
  replies[#replies + 1] = reply
end
return replies
