-- One bounded pass of the leader's housekeeping over what waits for a time.
-- ARGV: leader's session, term, retention of finished jobs in ms
-- Reply: {'done', promoted, found, given up, trimmed}, or 'not_leader'
local session, term, retention_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not leads(session, term) then return 'not_leader' end
local found, given_up, users = 0, 0, {}
local promoted = promote_due(1000)

-- Ids that were pushed before their hash, the thousand oldest: the youngest of them may have theirs by now. The oldest
-- goes back last, so that it ends up foremost.
for _, entry in ipairs(redis.call('ZREVRANGE', K.missing(), -1000, -1)) do
  local id, user = string.match(entry, '^(%S+) (.*)$')
  if redis.call('EXISTS', K.job(id)) == 1 then
    redis.call('ZREM', K.missing(), entry)
    if try('RPUSH', K.queue(user), id) then
      try('SADD', K.queued_users(), user)
      users[user] = true
    else
      set_aside(id, user, 'its queue holds a ' .. redis.call('TYPE', K.queue(user)).ok .. ', not a list')
    end
    found = found + 1
  elseif tonumber(redis.call('ZSCORE', K.missing(), entry)) <= now_ms then
    redis.call('ZREM', K.missing(), entry)
    reject(id, user, 'it was queued, but no hash of it came within ' .. math.floor(MISSING_MS / 1000) .. ' s')
    given_up = given_up + 1
  end
end

for user in pairs(users) do place_on(user) end

local old = redis.call('ZRANGEBYSCORE', K.finished(), '-inf', int(now_ms - retention_ms), 'LIMIT', 0, 5000)
if #old > 0 then redis.call('ZREM', K.finished(), unpack(old)) end
return {'done', promoted, found, given_up, #old}
