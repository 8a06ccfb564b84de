-- Creates the record of a job that an application runs itself.
-- ARGV: tracker, id, status, the application's numbers for the five statuses (separated by blanks), how long the record is kept
--   once it has ended in ms (0 for ever), data
-- Reply: 'created', 'exists' (there is one, by whomever: nothing was written), or {'no_room', bytes of memory used, bytes above
--   which nothing new is accepted}
local tracker, id, status, codes, keep_ms, data = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5]), ARGV[6]
local fault = wrong_type(tracker, id, status)
if fault then return fault end
if look_at(tracker, id) then return 'exists' end
-- The leader's word that memory is nearly full.
local used, mark = string.match(redis.call('GET', K.full()) or '', '^(%d+) (%d+)$')
if used then return {'no_room', used, mark} end
move_record(tracker, id, {codes = codes, keep_ms = keep_ms}, status,
  {'codes', codes, 'keep_ms', int(keep_ms), 'create_at', now(), 'retry', 0, 'data', data})
-- Places of an earlier record that has expired, or that others have removed.
for _, word in ipairs(WORDS) do
  if word ~= status then try('ZREM', index_of(tracker, word), id) end
end
trim(tracker)
return 'created'
