-- Starts a tracked job: its record is in progress, and locked until its holder ends it or lets the lock expire. An expired lock
-- is taken over, and the attempt under it counts as one that failed.
-- ARGV: tracker, id, lock (another one for each start), how long it lives in ms, how many failures make the job ignored (0: none do),
--   then the numbers of the application's own from which the job may start too
-- Reply: {'started', fence, failures so far, data} (to the holder again, too), {'locked', holder, until when in ms},
--   'succeeded', 'ignored', {'not_ready', code}, 'missing', or 'lost' (this lock was held once and is not any more)
local tracker, id, lock, expire_ms, most = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
local record = record_of(tracker, id)
local r = look_at(tracker, id)
local fault = wrong_type(tracker, id, 'in_progress', 'ignored', r and r.status)
if fault then return fault end
if not r then return 'missing' end

local function started(fence, retry)
  return {'started', fence, int(retry), redis.call('HSTRLEN', record, 'data') <= MAX_READ and redis.call('HGET', record, 'data') or ''}
end

if r.lock == lock then
  lock_for(tracker, id, expire_ms)
  return started(int(r.fence), r.retry)
end
-- Sent once and arrived after all was over.
if ended_under(record, lock) then return 'lost' end
if r.lock and r.lock_until > this.now_ms then return {'locked', r.lock, int(r.lock_until)} end
if r.status == 'succeeded' or r.status == 'ignored' then return r.status end

local ready = r.status == 'pending' or r.status == 'failed' or r.status == 'in_progress'
for i = 6, #ARGV do ready = ready or ARGV[i] == r.status end
if not ready then return {'not_ready', code_of(r.codes, r.status)} end

local fields = {}
if r.lock then
  fields = lost(record, r)
  r.retry = r.retry + 1
  if most > 0 and r.retry >= most then
    move_record(tracker, id, r, 'ignored', fields)
    return 'ignored'
  end
end
-- Greater than any before it, also where the clock was set back.
local fence = int(math.max(this.now_us, r.fence + 1))
local until_ms = this.now_ms + expire_ms
append(fields, 'lock', lock, 'lock_at', now(), 'lock_until', int(until_ms), 'fence', fence, 'max_retry', int(most))
move_record(tracker, id, r, 'in_progress', fields)
list_lock(tracker, id, until_ms)
return started(fence, r.retry)
