-- Cancels jobs: state first, message second.
-- ARGV: how long a final record is kept in ms, then for each job:
--   id, the `query` field as the caller saw it, number of fields and values, fields and values in turn: what to write if
--   the job still waits. What was seen counts only where there is something to write
-- Reply: for each job 'cancelled' (it waited), 'requested' (it runs: its worker is told; or a lost worker has left a trace:
--   who takes it next is), {'over', status}, 'changed' (its `query` is another by now: look again), 'missing', or 'unreadable' (what others
--   have written there can't be worked on: it is in the rejected list)
local retention_ms = tonumber(ARGV[1])

local function cancel(id, seen, fields)
  -- Who cancels a part means its batch.
  local what, batch = part_of(id)
  if what == 'rows' or what == 'files' then id = batch end
  local job = K.job(id)
  local claim = claim_of(id)
  local held = redis.call('TYPE', job).ok
  if claim then
    -- Whatever others have made of its hash: it runs, and its worker can stop it.
    if held == 'hash' then redis.call('HSETNX', job, 'cancel_requested_at', now()) end
    ask_to_cancel(id, claim)
    return 'requested'
  end
  if held ~= 'hash' then return 'missing' end
  if is_flow(id) then
    local reply = stop_flow(id, true)
    return (reply[1] == 'stopping' and 'requested') or (reply[1] == 'stopped' and 'cancelled') or reply
  end
  if is_batch(id) then
    local reply = abort_batch(id, retention_ms)
    return reply[1] == 'aborted' and 'cancelled' or reply
  end
  local h = redis.call('HMGET', job, 'status', 'fallback_status', 'query', 'user')
  -- A job that has ended but for its own fallback is cancelled by what the caller writes, or not at all.
  if is_over(h[1], h[2]) or (FINAL[h[1]] and #fields == 0) then return {'over', h[1]} end
  if redis.call('HSTRLEN', job, 'trace') > 0 then
    -- A lost worker's execution may have taken effect: only who takes the job next can find out, and need not wait for it.
    cancel_when_settled(id)
    return 'requested'
  end
  if #fields > 0 and (h[3] or '') ~= seen then return 'changed' end
  withdraw(id, h[4] or '', retention_ms, unpack(fields))
  return 'cancelled'
end

local replies = {}
local i = 2
while i <= #ARGV do
  local id, seen, m = ARGV[i], ARGV[i + 1], count_in(ARGV[i + 2])
  local fields = {unpack(ARGV, i + 3, i + 2 + m)}
  i = i + 3 + m
  replies[#replies + 1] = apart(id, '', cancel, id, seen, fields) or 'unreadable'
end
return replies
