-- Ends claims, many in one call.
-- ARGV: session, whether to wake another session for what becomes free (1 or 0), then for each job:
--   id, fence, verdict, run time in µs, ms, number of fields and values, fields and values in turn
--   verdict 'final': the fields carry the final status; ms is how long the record is kept
--           'next':  more statements are to come; back to the front of the queue
--           'back':  given back untouched, to the front
--           'later': scheduled, due in ms
--           'part':  of a batch: it has done what it was to do, and the fields say what came of it; ms as for a final one
-- Reply: for each job 'ended', 'repeated' (this same finish was applied before), or 'stale' (the claim is another's or
--   nobody's: nothing was written)
local PACE_MS = 7 * 86400000
local session, wake = ARGV[1], ARGV[2] == '1'
local replies = {}
-- What the claims that are ended for good have held.
local pools, users = {}, {}

-- Corrects what the take charged, where the pool is fair by time.
local function settle(claim, ran_us)
  if claim.by ~= 'time' or ran_us <= 0 then return end
  local expected = tonumber(redis.call('HGET', K.pace(claim.pool), claim.user) or ran_us)
  redis.call('HSET', K.pace(claim.pool), claim.user, int(0.7 * expected + 0.3 * ran_us))
  redis.call('PEXPIRE', K.pace(claim.pool), PACE_MS)
  recharge(claim, ran_us)
end

local i = 3
while i <= #ARGV do
  local id, fence, verdict, ran_us, ms, m = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3]), tonumber(ARGV[i + 4]),
    count_in(ARGV[i + 5])
  local fields = {unpack(ARGV, i + 6, i + 5 + m)}
  i = i + 6 + m
  local claim = claim_of(id)
  if not claim or claim.session ~= session or claim.fence ~= fence then
    replies[#replies + 1] = try('HGET', K.job(id), 'settled') == fence and 'repeated' or 'stale'
  else
    local pool = claim.pool
    local says = {}
    -- Whoever wrote `cancelled` into the hash was told that it is: it ends so, and the statements tell what was done, once that is known.
    if cancelled_by_hash(id) then
      local trace = try('HGET', K.job(id), 'trace')
      for f = 1, #fields, 2 do
        if fields[f] == 'status' then fields[f + 1] = 'cancelled' end
        if fields[f] == 'trace' then trace = fields[f + 1] end
      end
      if verdict ~= 'final' and verdict ~= 'part' then
        if is_to_be_settled('cancelled', trace) then verdict = 'back' else verdict, ms = 'final', MAX_REJECTED_MS end
      end
    end
    for f = 1, #fields, 2 do says[fields[f]] = fields[f + 1] end
    -- A cancel that was asked for meanwhile does not wait for a retry to be due: the next take hears of it.
    if verdict == 'later' and redis.call('SISMEMBER', K.cancels(session), id) == 1 then ms = 0 end
    local function write()
      if verdict == 'part' then
        end_part(id, claim.user, says, ms)
      elseif verdict == 'next' then
        if record(id, claim.user, 'user', claim.user, 'status', 'pending', 'settled', fence, unpack(fields))
          and put_first(id, line_of(pool, claim.user)) then
          publish(claim.user, id, 'pending')
        end
      elseif verdict == 'later' then
        if record(id, claim.user, 'user', claim.user, 'status', 'scheduled', 'settled', fence, unpack(fields)) then
          redis.call('ZADD', K.due(), int(this.now_ms + ms), id)
          publish(claim.user, id, 'scheduled')
        end
      elseif record(id, claim.user, 'user', claim.user, 'ended_at', now(), 'settled', fence, unpack(fields)) then
        file(id, claim.user, says.status or redis.call('HGET', K.job(id), 'status'), ms, not is_sql(pool))
      end
    end
    if verdict == 'back' then
      -- What was not done costs nothing; by time, what was begun costs the time it took.
      recharge(claim, claim.by == 'time' and ran_us or 0)
      append(fields, 'settled', fence)
      release(id, claim)
      apart(id, claim.user, put_back, id, claim, fields)
    else
      release(id, claim, pools, users)
      settle(claim, ran_us)
      apart(id, claim.user, write)
      place_on(line_of(pool, claim.user), pool)
    end
    if wake then wake_one(pool) end
    replies[#replies + 1] = 'ended'
  end
end
make_room(pools, users)
return replies
