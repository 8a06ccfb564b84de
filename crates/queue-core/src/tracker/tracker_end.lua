-- Ends an attempt of a tracked job and releases its lock. As long as nobody has taken it, an expired lock is its holder's: nobody
-- else has begun, so what the holder did counts.
-- ARGV: tracker, id, lock, fence, 'succeeded' (retry is 0 again) or 'failed' (retry + 1, and at the number that the start said
--   the job is ignored), its data from now on ('' for the same), its error and trace in JSON, the error for the history
-- Reply: {'ended', status, failures so far} (the same again to the same end), or 'lost' (the lock is another's or nobody's: nothing
--   was written)
local tracker, id, lock, fence, outcome, data, errors, error = unpack(ARGV)
local record = record_of(tracker, id)
local r = look_at(tracker, id)
if not r or int(r.fence) ~= fence or r.lock ~= lock then
  local past = r and ended_under(record, lock)
  if past and past.fence == fence and past.outcome ~= 'lost' then return {'ended', past.status, past.retry} end
  return 'lost'
end
local fault = wrong_type(tracker, id, 'in_progress', 'succeeded', 'failed', 'ignored', r.status)
if fault then return fault end

local status, retry = 'succeeded', 0
if outcome == 'failed' then
  retry = r.retry + 1
  local most = tonumber(redis.call('HGET', record, 'max_retry') or nil) or 0
  status = most > 0 and retry >= most and 'ignored' or 'failed'
end
local fields = {'retry', int(retry), 'history', history_with(record, {fence = fence, holder = lock, started_at = r.lock_at,
  ended_at = now(), outcome = outcome, status = status, retry = int(retry), error = outcome == 'failed' and error or nil})}
if outcome == 'failed' then
  append(fields, 'errors', errors)
elseif data ~= '' then
  append(fields, 'data', data)
end
move_record(tracker, id, r, status, fields)
trim(tracker)
return {'ended', status, int(retry)}
