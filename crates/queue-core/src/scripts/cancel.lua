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
  -- Who cancels a part means its batch.
  local part = (try('HSTRLEN', K.job(id), 'part') or 0) <= 256 and try('HGET', K.job(id), 'part') or ''
  local batch = string.match(part, '^rows (%S+)') or string.match(part, '^files (%S+)')
  if batch then id = batch end
  local job, reply = K.job(id), nil
  local claim = claim_of(id)
  local held = redis.call('TYPE', job).ok
  if claim then
    -- Whatever others have made of its hash: it runs, and its worker can stop it.
    if held == 'hash' then redis.call('HSETNX', job, 'cancel_requested_at', now) end
    ask_to_cancel(id, claim)
    reply = 'requested'
  elseif held ~= 'hash' then
    reply = 'missing'
  elseif redis.call('HGET', job, 'kind') == 'flow' then
    reply = stop_flow(id, true)
    if reply[1] == 'stopping' then reply = 'requested' elseif reply[1] == 'stopped' then reply = 'cancelled' end
  elseif redis.call('HGET', job, 'kind') == 'batch' then
    reply = abort_batch(id, retention_ms)
    if reply[1] == 'aborted' then reply = 'cancelled' end
  else
    local h = redis.call('HMGET', job, 'status', 'fallback_status', 'query', 'user')
    -- A job that has ended but for its own fallback is cancelled by what the caller writes, or not at all.
    if is_over(h[1], h[2]) or (FINAL[h[1]] and m == 0) then
      reply = {'over', h[1]}
    elseif redis.call('HSTRLEN', job, 'trace') > 0 then
      -- A lost worker's execution may have taken effect: only who takes the job next can find out, and need not wait for it.
      cancel_when_settled(id)
      reply = 'requested'
    elseif m > 0 and (h[3] or '') ~= seen then
      reply = 'changed'
    else
      withdraw(id, h[4] or '', retention_ms, unpack(fields))
      reply = 'cancelled'
    end
  end
  replies[#replies + 1] = reply
end
return replies
