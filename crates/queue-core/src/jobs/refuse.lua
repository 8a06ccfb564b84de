-- Sets aside what a take has claimed and its worker can't read, so that the worker goes on with all else.
-- ARGV: session, take number, reason, ids of the jobs that it could read
-- Reply: how many were set aside
local session, take, reason = ARGV[1], ARGV[2], ARGV[3]
local read, count, pools, users = {}, 0, {}, {}
for i = 4, #ARGV do read[ARGV[i]] = true end
local work = redis.call('HGETALL', K.work(session))
for i = 1, #work, 2 do
  local id = work[i]
  local claim = work[i + 1] == take and not read[id] and claim_of(id)
  if claim and claim.session == session then
    release(id, claim, pools, users)
    apart(id, claim.user, function()
      if part_of(id) and lost_part(id, claim.user, reason) then return end
      reject(id, claim.user, reason, redis.call('TYPE', K.job(id)).ok == 'hash')
    end)
    place_on(line_of(claim.pool, claim.user), claim.pool)
    count = count + 1
  end
end
make_room(pools, users)
return count
