-- Compares keys that must agree, from both sides, and repairs what does not: after a restore, a failover that lost writes,
-- or hands that edited keys. All is looked at anew here, so whatever the caller's scan saw, a finding is true and a repair
-- right at this moment, and what a live session holds stays its own.
-- ARGV: 'check' (changes nothing) or 'repair', leader's session and term (both '' where no leader calls), how long the record
--   of a finished job is kept in ms, what to look at, then its items:
--   'keys':     key and the type that it must have, in turn ('' if no key of ours has such a name)
--   'sessions', 'claims', 'due', 'missing', 'batches', 'jobs', 'finished', 'wip', 'pools', 'parked', 'lines', 'barred', 'uniques',
--   'schedules', 'tracked', 'classes', 'delayed':
--               sessions, ids, ids, entries, ids, ids, ids, users, pools, services, lines, users, unique keys,
--               names, records as `tracker:id`, classes of pools, ids
--   'work', 'cancels': a session, and ids that it holds or is asked to cancel
--   'busy': a pool of which many users have jobs that run, and some of them
--   'numbers': pools, whose own fields are looked at alone
--   'counts', 'active', 'delays', 'kept': pools, users, lines, nothing: what is said of these differs from what a walk through the
--               entries has found; here all are added up, in one step
--   'leader': nothing
-- Reply: 'not_leader', or for each finding {kind, what, sentence, 'reported', 'repairable' or 'repaired'}
local session, term = ARGV[2], ARGV[3]
if session ~= '' and not leads(session, term) then return 'not_leader' end
this.comparing = {repairs = ARGV[1] == 'repair', retention_ms = tonumber(ARGV[4]), findings = {}}
LOOK[ARGV[5]]({unpack(ARGV, 6)})
return this.comparing.findings
