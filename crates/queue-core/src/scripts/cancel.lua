-- Cancels jobs: state first, message second.
-- ARGV: how long a final record is kept in ms, then for each job:
--   id, the `query` field as the caller saw it, number of fields and values, fields and values in turn: what to write if
--   the job still waits. What was seen counts only where there is something to write
-- Reply: for each job 'cancelled' (it waited), 'requested' (it runs: its worker is told; or a lost worker has left a trace:
--   who takes it next is), {'over', status}, 'changed' (its `query` is another by now: look again), or 'missing'
local retention_ms = tonumber(ARGV[1])
local replies = {}
local i = 2
while i <= #ARGV do
  local id, seen, m = ARGV[i], ARGV[i + 1], tonumber(ARGV[i + 2])
  local fields = {unpack(ARGV, i + 3, i + 2 + m)}
  i = i + 3 + m
  local job, reply = K.job(id), nil
  local claim = claim_of(id)
  local held = redis.call('TYPE', job).ok
  if claim then
    -- Whatever others have made of its hash: it runs, and its worker can stop it.
    if held == 'hash' then redis.call('HSETNX', job, 'cancel_requested_at', now) end
    redis.call('SADD', K.cancels(claim.session), id)
    tell(K.cancel(claim.session), id)
    reply = 'requested'
  elseif held ~= 'hash' then
    reply = 'missing'
  else
    local h = redis.call('HMGET', job, 'status', 'fallback_status', 'query', 'user')
    -- A job that has ended but for its own fallback is cancelled by what the caller writes, or not at all.
    if is_over(h[1], h[2]) or (FINAL[h[1]] and m == 0) then
      reply = {'over', h[1]}
    elseif redis.call('HSTRLEN', job, 'trace') > 0 then
      -- A lost worker's execution may have taken effect: only who takes the job next can find out, and need not wait for it.
      redis.call('HSETNX', job, 'cancel_requested_at', now)
      redis.call('ZADD', K.due(), 'XX', int(now_ms), id)
      reply = 'requested'
    elseif m > 0 and (h[3] or '') ~= seen then
      reply = 'changed'
    else
      local user = h[4] or ''
      -- A long queue is not searched: take drops what is final.
      if (try('LLEN', K.queue(user)) or 0) <= 1000 and try('LREM', K.queue(user), 0, id)
        and redis.call('EXISTS', K.queue(user)) == 0 then try('SREM', K.queued_users(), user) end
      unschedule(id)
      record(id, user, 'status', 'cancelled', 'ended_at', now, 'cancel_requested_at', now, unpack(fields))
      file(id, user, redis.call('HGET', job, 'status'), retention_ms)
      -- Another job is the user's head now, perhaps of another pool.
      if is_user(user) then place_on(user) end
      reply = 'cancelled'
    end
  end
  replies[#replies + 1] = reply
end
return replies
