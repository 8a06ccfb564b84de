-- One bounded pass of the leader's housekeeping over what waits for a time.
-- ARGV: leader's session, term, retention of finished jobs in ms, most of them, most bytes of them, bytes of memory that
--   the server uses, bytes above which nothing new is accepted (0 for no limit each), for how many ms that holds
-- Reply: {'done', promoted, found, given up, trimmed, evicted, 1 if nothing new is accepted or 0}, or 'not_leader'
local session, term, retention_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
local most, most_bytes = tonumber(ARGV[4]), tonumber(ARGV[5])
local used, mark, full_ms = tonumber(ARGV[6]), tonumber(ARGV[7]), ARGV[8]
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
  elseif tonumber(redis.call('ZSCORE', K.missing(), entry)) <= this.now_ms then
    redis.call('ZREM', K.missing(), entry)
    reject(id, user, 'it was queued, but no hash of it came within ' .. math.floor(MISSING_MS / 1000) .. ' s')
    given_up = given_up + 1
  end
end

for user in pairs(users) do place_and_wake('sql:' .. user) end

-- What others have begun anew is no record: it must not expire while it waits. Looked at well before its time.
local begun = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.expiring(), int(this.now_ms), int(this.now_ms + 30000), 'LIMIT', 0, 1000)) do
  if redis.call('TYPE', K.job(id)).ok == 'hash' then
    local h = redis.call('HMGET', K.job(id), 'status', 'fallback_status')
    if not is_over(h[1], h[2]) then
      redis.call('PERSIST', K.job(id))
      begun[#begun + 1] = id
    end
  end
end
forget(begun)

-- Records whose time is over, by what their keeper said.
local expired = redis.call('ZRANGEBYSCORE', K.expiring(), '-inf', int(this.now_ms), 'LIMIT', 0, 5000)
forget(expired)

-- The oldest of those that are more than may be kept.
local count, bytes = redis.call('ZCARD', K.finished()), tonumber(redis.call('HGET', K.kept(), '*') or 0)
local function too_much() return (most > 0 and count > most) or (most_bytes > 0 and bytes > most_bytes) end
local evicted = {}
if too_much() then
  local oldest = redis.call('ZRANGE', K.finished(), 0, 999)
  local sizes = redis.call('HMGET', K.kept(), unpack(oldest))
  for i, id in ipairs(oldest) do
    if not too_much() then break end
    local job = K.job(id)
    -- One that somebody has begun anew is no record.
    if redis.call('TYPE', job).ok == 'hash' and redis.call('HEXISTS', K.claims(), id) == 0 then
      local h = redis.call('HMGET', job, 'status', 'fallback_status')
      if is_over(h[1], h[2]) then remove_record(id) end
    end
    evicted[#evicted + 1] = id
    count, bytes = count - 1, bytes - (tonumber(sizes[i]) or 0)
  end
  forget(evicted)
end

-- Above the mark nothing new is accepted, until there is some room below it. Without a leader this ends by itself.
local full = mark > 0 and (used >= mark or (used >= 0.95 * mark and redis.call('EXISTS', K.full()) == 1))
if full then
  redis.call('SET', K.full(), int(used) .. ' ' .. int(mark), 'PX', full_ms)
else
  redis.call('DEL', K.full())
end
return {'done', promoted, found, given_up, #expired, #evicted, full and 1 or 0}
