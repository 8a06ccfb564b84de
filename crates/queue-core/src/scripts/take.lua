-- Takes up to n jobs for a session: from each pool in turn, the ready user with the least virtual time.
-- ARGV: session, service, take number, n, default capacity, fairness ('jobs' or 'time')
-- Reply: {'lost'}: the session is not registered (any more); or
--        {'taken', ms until the next take can find more (a job is due, or a look was cut short) or '', job, …}, a job being
--        {id, user, pool, fence, the user's timeout in ms or '', value of each of FIELDS or nil}
-- The same take number again returns the same jobs, so a lost reply loses nothing.
local session, service, take, n = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local default_capacity, fairness = tonumber(ARGV[5]), ARGV[6]

local s = redis.call('HMGET', K.session(session), 'take', 'dead')
if not s[1] or s[2] then return {'lost'} end

local reply = {'taken', ''}

local function tell_due()
  local due = redis.call('ZRANGE', K.due(), 0, 0, 'WITHSCORES')
  if due[2] then reply[2] = int(math.max(0, tonumber(due[2]) - now_ms)) end
end

local function hand_out(id, user, pool, fence)
  local job = {id, user, pool, fence, try('HGET', K.limits(user), 'timeout') or ''}
  for _, value in ipairs(redis.call('HMGET', K.job(id), unpack(NAMES))) do job[#job + 1] = value end
  reply[#reply + 1] = job
end

if s[1] == take then
  local work = redis.call('HGETALL', K.work(session))
  for i = 1, #work, 2 do
    local claim = work[i + 1] == take and claim_of(work[i])
    if claim and redis.call('TYPE', K.job(work[i])).ok == 'hash' then
      hand_out(work[i], claim.user, claim.pool, claim.fence)
    end
  end
  tell_due()
  return reply
end
redis.call('ZREM', K.parked(service), session)
redis.call('HSET', K.session(session), 'take', take)

-- Due jobs first join their queues, so that delays and retries need no leader.
promote_due(100)

local taken = 0

local function claim_head(id, user, pool, start, suspected)
  local job = K.job(id)
  local status = redis.call('HGET', job, 'status')
  -- One µs apart, so that fences tell the order of jobs that are taken together.
  taken = taken + 1
  local fence = now_us + taken
  local stored = redis.call('HSTRLEN', job, 'fence') <= 20 and tonumber(redis.call('HGET', job, 'fence') or 0) or 0
  if stored >= fence and stored < 9e15 then fence = stored + 1 end
  fence = int(fence)
  local cost = 1000000
  if fairness == 'time' then cost = tonumber(redis.call('HGET', K.pace(pool), user) or 1000000) end
  redis.call('RPOP', K.queue(user))
  local tag = int(start + math.max(1, math.floor(cost / weight_of(user))))
  redis.call('HSET', K.claims(), id, table.concat({session, fence, pool, user, int(cost), tag, fairness}, '\t'))
  redis.call('HSET', K.work(session), id, take)
  redis.call('HINCRBY', K.pool(pool), 'running', 1)
  redis.call('HINCRBY', K.busy(pool), user, 1)
  try('LPUSH', K.wip(user), id)
  try('SADD', K.wip_users(), user)
  -- One suspect at a time, so that the next end of this worker tells which job it was.
  if suspected then redis.call('HSET', K.session(session), 'suspect', id) end
  -- A status that is decided already stays: only the job-level fallback is left to run.
  if not FINAL[status] then redis.call('HSET', job, 'status', 'running') end
  redis.call('HSET', job, 'user', user, 'fence', fence, 'worker', session, 'updated_at', now)
  redis.call('HSETNX', job, 'started_at', now)
  -- A record of an earlier run may have had its time to live.
  redis.call('PERSIST', job)
  -- Others may have queued it before it was due.
  unschedule(id)
  publish(user, id, 'running')
  hand_out(id, user, pool, fence)
  return tag
end

-- Pools that got their first ready user since they were listed.
local opened = {}

-- Whether the session runs a suspect. A claim that got lost leaves none behind.
local function runs_suspect()
  local id = redis.call('HGET', K.session(session), 'suspect')
  if not id then return false end
  local claim = claim_of(id)
  if claim and claim.session == session then return true end
  redis.call('HDEL', K.session(session), 'suspect')
  return false
end

-- By pool, the users that this take has passed over.
local passed_users = {}

-- One job of a pool, or false if the pool has none to give; 'blocked' if it has and may not, 'more' if a hundred users had
-- nothing (any more) and others stand behind them.
-- A session that runs a suspect leaves others of that kind alone: their users keep their places for other sessions. So many
-- are passed over as no pool should ever have, lest users behind them wait for the end of that suspect.
local function take_one(pool)
  local p = redis.call('HMGET', K.pool(pool), 'capacity', 'running', 'v', 'blocked')
  if p[4] then return 'blocked' end
  if tonumber(p[2] or 0) >= tonumber(p[1] or default_capacity) then return false end
  if redis.call('EXISTS', K.ready(pool)) == 0 then return false end
  -- Looked at here too: the leader comes by only from time to time, and takes its own lock then. It also lifts this.
  local host = string.match(pool, '^sql:(.+)')
  local holder = host and try('GET', K.host_lock(host))
  if holder and string.sub(holder, 1, 8) ~= 'drayman:' then
    redis.call('HSET', K.pool(pool), 'blocked', BLOCKED)
    return 'blocked'
  end
  local known = passed_users[pool] or {}
  passed_users[pool] = known
  local passed_over, empty = 0, 0
  while empty < 100 do
    if passed_over >= 1000 then return 'blocked' end
    local first = redis.call('ZRANGE', K.ready(pool), passed_over, passed_over, 'WITHSCORES')
    local user, start = first[1], tonumber(first[2])
    if not user then return passed_over > 0 and 'blocked' end
    local id, actual
    if not known[user] then
      id, actual = head(user)
      local suspected = id and actual == pool and unclean_of(id) >= SUSPECT_AFTER
      if suspected and runs_suspect() then
        known[user] = true
      else
        redis.call('ZREM', K.ready(pool), user)
        if id and actual == pool then
          local tag = claim_head(id, user, pool, start, suspected)
          local v = math.max(tonumber(p[3] or 0), start)
          redis.call('HSET', K.pool(pool), 'v', int(v))
          redis.call('ZADD', K.debt(pool), tag, user)
          redis.call('ZREMRANGEBYSCORE', K.debt(pool), '-inf', int(v))
          local at, new = place(user)
          if new and at ~= pool then opened[#opened + 1] = at end
          return true
        end
        if id and ready(actual, user) then opened[#opened + 1] = actual end
        empty = empty + 1
      end
    end
    if known[user] then passed_over = passed_over + 1 end
  end
  return redis.call('EXISTS', K.ready(pool)) == 1 and 'more'
end

-- By pages: pools that nobody serves must not hide those behind them.
local pools, listed, unfinished = {}, {}, false
for from = 0, 9000, 1000 do
  local page = redis.call('ZRANGE', K.pools(), from, from + 999)
  for _, pool in ipairs(page) do
    if serves(service, pool) then
      pools[#pools + 1] = pool
      listed[pool] = true
    end
  end
  if #page < 1000 or #pools >= 1000 then break end
end

-- Behind all others, also where a clock that was set back gives less than they have.
local last_turn = math.max(now_us, tonumber(redis.call('ZRANGE', K.pools(), -1, -1, 'WITHSCORES')[2] or 0))

while #pools > 0 and taken < n do
  local still = {}
  for _, pool in ipairs(pools) do
    if taken >= n then
      still[#still + 1] = pool
    else
      local got = take_one(pool)
      if got == true then
        redis.call('ZADD', K.pools(), int(last_turn + taken), pool)
        still[#still + 1] = pool
      elseif got == 'more' then
        -- It stays listed, and the next take goes on with it.
        unfinished = true
      else
        -- A blocked pool keeps its entry: the leader finds by it whose lock to look after.
        if not got then redis.call('ZREM', K.pools(), pool) end
        listed[pool] = nil
      end
    end
  end
  for _, pool in ipairs(opened) do
    if not serves(service, pool) then
      wake_one(pool)
    elseif not listed[pool] then
      still[#still + 1] = pool
      listed[pool] = true
    end
  end
  opened = {}
  pools = still
end

if taken < n then
  redis.call('ZADD', K.parked(service), now_ms, session)
  redis.call('SADD', K.services(), service)
end
-- This session is full: where there is more to take, somebody else is to look.
for _, pool in ipairs(pools) do
  local p = redis.call('HMGET', K.pool(pool), 'capacity', 'running')
  if redis.call('EXISTS', K.ready(pool)) == 1 and tonumber(p[2] or 0) < tonumber(p[1] or default_capacity) then
    wake_one(pool)
    break
  end
end
tell_due()
if unfinished then reply[2] = '0' end
return reply
