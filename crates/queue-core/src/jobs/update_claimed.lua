-- Writes fields of a running job under its claim, before the step that they announce.
-- ARGV: session, id, fence, then fields and values in turn (none: only asks whether the claim still holds)
-- Reply: 'held', 'stale' (nothing was written), or 'cancel' (held and written, and a cancel is asked for)
local session, id, fence = ARGV[1], ARGV[2], ARGV[3]
local claim = claim_of(id)
if not claim or claim.session ~= session or claim.fence ~= fence then return 'stale' end
if cancelled_by_hash(id) then redis.call('SADD', K.cancels(session), id) end
if #ARGV > 3 then record(id, claim.user, unpack(ARGV, 4)) end
if redis.call('SISMEMBER', K.cancels(session), id) == 1 then return 'cancel' end
return 'held'
