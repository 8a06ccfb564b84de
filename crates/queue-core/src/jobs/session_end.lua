-- Ends a session and gives its jobs back to the front of their queues.
-- ARGV: 'close', session: the worker itself leaves; or
--       'reclaim', session, beat, leader's session, leader's term: the leader saw this beat stand still for a lifetime
--   then '' and ids of jobs that it holds, fifty of them at most: the one taken last first, so that the one taken first ends up foremost.
--   Earlier programs say neither: then it is looked here what it holds
-- Reply: {'ended' or 'more', number of jobs given back}, or 'alive' (the beat went on), or 'not_leader'. 'more': it takes nothing any more,
--   and holds jobs still
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

local first, ids = how == 'close' and 3 or 6, {}
if ARGV[first] then
  ids = {unpack(ARGV, first + 1)}
else
  local fences = {}
  ids = redis.call('HKEYS', K.work(session))
  for _, id in ipairs(ids) do fences[id] = tonumber((claim_of(id) or {}).fence) or 0 end
  table.sort(ids, function(a, b) return fences[a] > fences[b] end)
  ids = {unpack(ids, 1, math.min(#ids, 1000))}
end

local count = 0
for _, id in ipairs(ids) do
  local claim = claim_of(id)
  if claim and claim.session == session then
    if how == 'close' then recharge(claim, 0) end
    release(id, claim)
    apart(id, claim.user, how == 'close' and put_back or lose, id, claim, {})
    wake_one(claim.pool)
    count = count + 1
  else
    redis.call('HDEL', K.work(session), id)
  end
end
if redis.call('HLEN', K.work(session)) > 0 then return {'more', count} end
redis.call('DEL', K.session(session), K.cancels(session))
redis.call('SREM', K.sessions(), session)
return {'ended', count}
