-- Ends a session and gives its jobs back to the front of their queues, the longest running first in line.
-- ARGV: 'close', session: the worker itself leaves; or
--       'reclaim', session, beat, leader's session, leader's term: the leader saw this beat stand still for a lifetime
-- Reply: {'ended' or 'more', number of jobs given back}, or 'alive' (the beat went on), or 'not_leader'
local how, session, beat = ARGV[1], ARGV[2], ARGV[3]
if how == 'reclaim' then
  if not leads(ARGV[4], ARGV[5]) then return 'not_leader' end
  local stands = redis.call('HGET', K.session(session), 'beat')
  if stands and stands ~= beat then return 'alive' end
end
local s = redis.call('HMGET', K.session(session), 'service', 'parked')
-- From here on the session can neither beat nor take, however many calls the rest needs.
redis.call('HSET', K.session(session), 'dead', now())
if s[1] then unpark(session, s[2] or s[1]) end

local jobs = {}
for _, id in ipairs(redis.call('HKEYS', K.work(session))) do
  local claim = claim_of(id)
  if claim and claim.session == session then
    jobs[#jobs + 1] = {id, claim}
  else
    redis.call('HDEL', K.work(session), id)
  end
end
-- The one taken last goes back first, so that the one taken first ends up foremost: over all calls, so all are sorted.
table.sort(jobs, function(a, b) return tonumber(a[2].fence) > tonumber(b[2].fence) end)
local count = math.min(#jobs, 1000)
for i = 1, count do
  local id, claim = jobs[i][1], jobs[i][2]
  if how == 'close' then recharge(claim, 0) end
  release(id, claim)
  apart(id, claim.user, how == 'close' and put_back or lose, id, claim, {})
  wake_one(claim.pool)
end
if #jobs > count then return {'more', count} end
redis.call('DEL', K.session(session), K.work(session), K.cancels(session))
redis.call('SREM', K.sessions(), session)
return {'ended', count}
