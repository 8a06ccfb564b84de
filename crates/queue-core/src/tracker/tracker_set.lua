-- Gives a tracked job that nobody works on another status: an operator's or the application's own word.
-- ARGV: tracker, id, 'pending' (its failures are forgotten), 'ignored', or a number of the application's
-- Reply: 'set' (or it had that status), 'missing', 'succeeded' (that is final), {'locked', holder, until when in ms}, or 'taken' (the number
--   is the application's for a status that only an attempt gives)
local tracker, id, to = ARGV[1], ARGV[2], ARGV[3]
local record = record_of(tracker, id)
local r = look_at(tracker, id)
if r then
  for _, word in ipairs(WORDS) do
    if code_of(r.codes, word) == to then to = word end
  end
end
local fault = wrong_type(tracker, id, to, r and r.status)
if fault then return fault end
if not r then return 'missing' end
if to == 'in_progress' or to == 'succeeded' or to == 'failed' then return 'taken' end
if r.status == 'succeeded' then return 'succeeded' end
if r.lock and r.lock_until > this.now_ms then return {'locked', r.lock, int(r.lock_until)} end
if r.status == to then return 'set' end
local fields = r.lock and lost(record, r) or {}
if to == 'pending' then
  append(fields, 'retry', 0)
end
move_record(tracker, id, r, to, fields)
return 'set'
