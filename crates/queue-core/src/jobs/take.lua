-- Takes up to n jobs for a session, and no more than a hundred: of the pools that have some, the one whose turn it is, and in it the ready user with the
-- least virtual time.
-- ARGV: session, service, take number, n, default capacity, fairness ('jobs' or 'time'), then pools of which the session has room
--   for only so many, and how many, in turn
-- Reply: {'lost'}: the session is not registered (any more); or
--        {'taken', ms until the next take can find more (a job is due, a limit allows more, or a look was cut short) or '',
--        job, …}, a job being {id, user, pool, fence, the user's timeout in ms or '', value of each of the FIELDS of its
--        kind or nil}
-- The same take number again returns the same jobs, so a lost reply loses nothing.
local session, service, take, asked_for = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local n = math.min(asked_for, 100)
local default_capacity, fairness = tonumber(ARGV[5]), ARGV[6]

local room = {}
for i = 7, #ARGV, 2 do room[ARGV[i]] = tonumber(ARGV[i + 1]) end

local s = redis.call('HMGET', K.session(session), 'take', 'dead', 'parked')
if not s[1] or s[2] then return {'lost'} end

local reply = {'taken', ''}

-- Everybody who is parked hears when a rate allows more: of one that allows much, every so often.
local RATE_TICK_MS = 20

local function tell_due()
  local due = tonumber(redis.call('ZRANGE', K.due(), 0, 0, 'WITHSCORES')[2])
  local allowed = tonumber(redis.call('ZRANGE', K.throttled(), 0, 0, 'WITHSCORES')[2])
  local first = math.min(due or math.huge, allowed and math.max(allowed, this.now_ms + RATE_TICK_MS) or math.huge)
  if first < math.huge then reply[2] = int(math.max(0, first - this.now_ms)) end
end

local function hand_out(id, user, pool, fence, timeout, values)
  local kind = is_sql(pool) and 'sql' or 'task'
  values = values or redis.call('HMGET', K.job(id), unpack(NAMES[kind]))
  local at = PART_AT[kind]
  -- What a part is, its hash does not decide.
  if values[at] then values[at] = part_text(id, values[at]) end
  local job = {id, user, pool, fence, timeout and int(timeout) or ''}
  for i = 1, HANDED[kind] do job[#job + 1] = values[i] end
  reply[#reply + 1] = job
end

if s[1] == take then
  local work = redis.call('HGETALL', K.work(session))
  for i = 1, #work, 2 do
    local claim = work[i + 1] == take and claim_of(work[i])
    if claim and redis.call('TYPE', K.job(work[i])).ok == 'hash' then
      hand_out(work[i], claim.user, claim.pool, claim.fence, limits_of(claim.user).timeout)
    end
  end
  tell_due()
  return reply
end
redis.call('ZREM', K.parked(s[3] or service), session)
redis.call('HSET', K.session(session), 'take', take)

-- What is due joins its line, and what a rate allows again stands for its turn, so that neither needs a leader.
promote_due(100)
for _, whose in ipairs(redis.call('ZRANGEBYSCORE', K.throttled(), '-inf', int(this.now_ms), 'LIMIT', 0, 100)) do
  redis.call('ZREM', K.throttled(), whose)
  local kind, name = string.match(whose, '^(%a+):(.*)$')
  local pools = kind == 'user' and lift(name, 100) or {}
  if kind == 'pool' and redis.call('EXISTS', K.ready(name)) == 1 then
    list_pool(name)
    pools = {name}
  end
  for _, pool in ipairs(pools) do
    if not serves(service, pool) then wake_one(pool) end
  end
end

local function throttle(whose, until_ms) redis.call('ZADD', K.throttled(), int(until_ms), whose) end

local function count_start(whose, own)
  if not own.rate then return end
  redis.call('LPUSH', K.starts(whose), int(this.now_ms))
  redis.call('LTRIM', K.starts(whose), 0, own.rate - 1)
  redis.call('PEXPIRE', K.starts(whose), int(own.period))
end

-- The limits of users whose turn has come in this take.
local limits = {}

-- Whether a user's limits keep its line from its turn. Then it gets another one when they may allow it.
local function bar(line, user)
  limits[user] = limits[user] or limits_of(user)
  local why, until_ms = user_kept_by(user, limits[user])
  if not why then return false end
  redis.call('SADD', K.barred(user), line)
  if until_ms then throttle('user:' .. user, until_ms) end
  return true
end

local taken = 0

-- Claims a line's head, or rows of it if it is a batch. Returns the user's finish tag, how many of the user's jobs run in the pool, and whether more waits.
local function claim_head(id, line, user, pool, h, queue, has_bands, start, suspected)
  local own, more = limits[user], true
  if h.kind == 'batch' then
    local is_left
    id, is_left = deal(id, user)
    h = {status = 'pending', kind = 'part'}
    if is_left then pass_head(line, queue, has_bands) else more = pop_head(line, queue, has_bands) end
    queue = nil
  end
  local job = K.job(id)
  -- One µs apart, so that fences tell the order of jobs that are taken together.
  taken = taken + 1
  local fence = this.now_us + taken
  local stored = #(h.fence or '') <= 20 and tonumber(h.fence or 0) or 0
  if stored >= fence and stored < 9e15 then fence = stored + 1 end
  fence = int(fence)
  local cost = 1000000
  if fairness == 'time' then cost = tonumber(redis.call('HGET', K.pace(pool), user) or 1000000) end
  local tag = int(start + math.max(1, math.floor(cost / own.weight)))
  redis.call('HSET', K.claims(), id, table.concat({session, fence, pool, user, int(cost), tag, fairness}, '\t'))
  redis.call('HSET', K.work(session), id, take)
  -- Only now: of a job that others have pushed nothing else says that it is there.
  if queue then more = pop_head(line, queue, has_bands) end
  local busy = redis.call('HINCRBY', K.busy(pool), user, 1)
  redis.call('HINCRBY', K.active(), user, 1)
  count_start('user:' .. user, own)
  if is_sql(pool) then
    try('LPUSH', K.wip(user), id)
    try('SADD', K.wip_users(), user)
  end
  -- One suspect at a time, so that the next end of this worker tells which job it was.
  if suspected then redis.call('HSET', K.session(session), 'suspect', id) end
  if h.unique then give_up_unique(id, 'queued') end
  -- A status that is decided already stays: only the job-level fallback is left to run.
  local status = FINAL[h.status] and h.status or 'running'
  redis.call('HSET', job, 'status', status, 'user', user, 'fence', fence, 'worker', session, 'updated_at', now(), 'started_at',
    h.started_at or now())
  -- A record of an earlier run may have had its time to live.
  redis.call('PERSIST', job)
  -- Others may have queued it before it was due.
  unschedule(id)
  if h.kind ~= 'part' then publish(user, id, 'running') end
  if h.values then h.values[STATUS_AT] = status end
  hand_out(id, user, pool, fence, own.timeout, h.values)
  return tag, busy, more
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

-- So many ids a take looks at; of a user whose turn has come a hundred more, if they can't run.
local MOST_LOOKED = 300 + 2 * n

-- The pools that were asked in this take, with what has moved in them and is not written yet: `count` jobs, the virtual time
-- `v`, the turn `pass`.
local asked = {}

-- The classes of pools that it looks at.
local begun = {}

-- A pool has left its place among those of its class: what stands behind it has moved up.
local function moved(pool)
  local class = begun[class_of(pool)]
  if class then class.read = math.max(0, class.read - 1) end
end

local function write_down(pool)
  local own = asked[pool]
  if not own or own.count == 0 then return end
  redis.call('HINCRBY', K.pool(pool), 'running', own.count)
  redis.call('HSET', K.pool(pool), 'v', int(own.v), 'pass', int(own.pass))
  redis.call('ZREMRANGEBYSCORE', K.debt(pool), '-inf', int(own.v))
  redis.call('ZADD', K.pools(class_of(pool)), 'XX', int(own.pass), pool)
  moved(pool)
  own.count = 0
end

-- One job of a pool: true and the pool's next turn. False if the pool has none to give; 'blocked' if it has and may not, 'full' if
-- this session has no room for more of it, 'more' if so much was met that can't run as one call bears, and others stand behind that.
-- A session that runs a suspect leaves others of that kind alone: their users keep their places for other sessions. So many
-- are passed over as no pool should ever have, lest users behind them wait for the end of that suspect.
local function take_one(pool, pass)
  local own = asked[pool]
  if not own then
    own = limits_of_pool(pool, default_capacity)
    own.count = 0
    asked[pool] = own
  end
  if own.blocked then return 'blocked' end
  if room[pool] and room[pool] <= 0 then return 'full' end
  if redis.call('EXISTS', K.ready(pool)) == 0 then return false end
  -- It is listed again when it goes on: by an end of one of its jobs, by its rate's time, or by an operator.
  local why, until_ms = kept_by('pool:' .. pool, own, own.running)
  if until_ms then throttle('pool:' .. pool, until_ms) end
  if why then return false end
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
  while empty < 100 and this.looked < MOST_LOOKED do
    if passed_over >= 1000 then return 'blocked' end
    local first = redis.call('ZRANGE', K.ready(pool), passed_over, passed_over, 'WITHSCORES')
    local user, start = first[1], tonumber(first[2])
    if not user then return passed_over > 0 and 'blocked' end
    if not known[user] then
      local line = line_of(pool, user)
      if bar(line, user) then
        redis.call('ZREM', K.ready(pool), user)
        empty = empty + 1
      else
        local id, actual, h, queue, has_bands = head(line)
        local suspected = id and actual == pool and unclean_in(h.unclean) >= SUSPECT_AFTER and redis.call('EXISTS', K.lost(id)) == 1
        if suspected and runs_suspect() then
          known[user] = true
        else
          if id and actual == pool then
            local tag, busy, more = claim_head(id, line, user, pool, h, queue, has_bands, start, suspected)
            count_start('pool:' .. pool, own)
            own.running, own.count = own.running + 1, own.count + 1
            if room[pool] then room[pool] = room[pool] - 1 end
            own.v, own.pass = math.max(own.v, start), pass + math.floor(1000000 / own.weight)
            this.moved_on.v[pool] = own.v
            redis.call('ZADD', K.debt(pool), tag, user)
            if not is_sql(pool) and more and busy < own.per_user then
              -- The user keeps standing there, further back.
              redis.call('ZADD', K.ready(pool), tag, user)
            else
              redis.call('ZREM', K.ready(pool), user)
              local at_pool, new = place(line)
              if new and at_pool ~= pool then opened[#opened + 1] = at_pool end
            end
            return true, own.pass
          end
          redis.call('ZREM', K.ready(pool), user)
          if id and ready(actual, user) then opened[#opened + 1] = actual end
          empty = empty + 1
        end
      end
    end
    if known[user] then passed_over = passed_over + 1 end
  end
  return redis.call('EXISTS', K.ready(pool)) == 1 and 'more'
end

-- Pools with something to take that this session serves, in a heap by their turns: {pool, pass}, the least foremost.
local heap, listed = {}, {}

local function before(a, b) return a[2] < b[2] or (a[2] == b[2] and a[1] < b[1]) end

local function sink(at)
  while true do
    local least, child = at, 2 * at
    if heap[child] and before(heap[child], heap[least]) then least = child end
    if heap[child + 1] and before(heap[child + 1], heap[least]) then least = child + 1 end
    if least == at then return end
    heap[at], heap[least] = heap[least], heap[at]
    at = least
  end
end

local function add(pool, pass)
  local at = #heap + 1
  heap[at] = {pool, pass}
  while at > 1 and before(heap[at], heap[math.floor(at / 2)]) do
    local parent = math.floor(at / 2)
    heap[at], heap[parent] = heap[parent], heap[at]
    at = parent
  end
  listed[pool] = true
end

local function drop_first()
  heap[1] = heap[#heap]
  heap[#heap] = nil
  if heap[1] then sink(1) end
end

-- A pool that fewer sessions serve than others, or none for a while, has a claim to what it missed, but not for ever: else the
-- others would wait until it has had all of it.
local LAG = 100 * 1000000
local turn = tonumber(redis.call('GET', K.turn()) or 0) or 0

-- Each class of which this session serves any is read by pages, as far as turns have come: `read` are so many, the `last` of them has
-- that turn, `in_part` says that not all are served. What is not served is met only where a pattern or names cover a class in part.
local PAGE, MOST_LISTED = math.min(50, 8 + n), 1000
local reading, count_listed = {}, 0

local function read_on(class)
  local page = redis.call('ZRANGE', K.pools(class.name), class.read, class.read + PAGE - 1, 'WITHSCORES')
  for i = 1, #page, 2 do
    local pool, pass = page[i], tonumber(page[i + 1])
    class.last = math.max(pass, turn - LAG)
    if not class.seen[pool] and not listed[pool] and (not class.in_part or serves(service, pool)) then
      add(pool, math.max(pass, turn - LAG))
      count_listed = count_listed + 1
    end
    class.seen[pool] = true
  end
  class.read = class.read + #page / 2
  class.at_end = #page < 2 * PAGE or class.read >= 10 * MOST_LISTED
end

-- Reads on where a pool may stand whose turn comes before that of the first one.
local function read_on_where_due()
  for _, class in ipairs(reading) do
    while not class.at_end and count_listed < MOST_LISTED and (not heap[1] or class.last < heap[1][2]) do
      read_on(class)
    end
  end
end

if redis.call('EXISTS', K.paused()) == 0 then
  local own = service_parts(service)
  local function begin_with(name, in_part)
    if not begun[name] then
      begun[name] = {name = name, read = 0, last = -1, seen = {}, in_part = in_part}
      reading[#reading + 1] = begun[name]
    elseif not in_part then
      begun[name].in_part = false
    end
  end
  for _, pattern in ipairs(own.open) do
    local prefix = string.sub(pattern, 1, -2)
    local class = class_of(prefix)
    if class ~= prefix then
      begin_with(class, true)
    elseif string.find(prefix, '[:.]$') then
      begin_with(class, false)
    else
      for _, name in ipairs(redis.call('SMEMBERS', K.classes())) do
        if string.sub(name, 1, #prefix) == prefix then begin_with(name, false) end
      end
    end
  end
  for name, names in pairs(own.names) do
    local listed_there = begun[name] and 0 or redis.call('ZCARD', K.pools(name))
    if listed_there > #names then
      for first = 1, #names, 1000 do
        local some = {unpack(names, first, math.min(first + 999, #names))}
        for at, pass in ipairs(redis.call('ZMSCORE', K.pools(name), unpack(some))) do
          if pass and not listed[some[at]] then add(some[at], math.max(tonumber(pass), turn - LAG)) end
        end
      end
    elseif listed_there > 0 then
      begin_with(name, true)
    end
  end
  read_on_where_due()
end

local full, unfinished = {}, false
while heap[1] and taken < n do
  local pool, pass = heap[1][1], heap[1][2]
  local got, next_pass = take_one(pool, pass)
  if got == true then
    this.moved_on.turn = math.max(this.moved_on.turn, pass)
    heap[1][2] = next_pass
    sink(1)
  else
    drop_first()
    listed[pool] = nil
    write_down(pool)
    asked[pool] = nil
    if got == 'full' then
      -- It stays listed: others have room.
      full[#full + 1] = pool
    elseif got == 'more' then
      -- It stays listed, and the next take goes on with it.
      unfinished = true
    elseif not got then
      -- A blocked pool keeps its entry: the leader finds by it whose lock to look after.
      if redis.call('ZREM', K.pools(class_of(pool)), pool) == 1 then moved(pool) end
    end
  end
  for _, other in ipairs(opened) do
    if not serves(service, other) then
      wake_one(other)
    elseif not listed[other] then
      add(other, tonumber(redis.call('ZSCORE', K.pools(class_of(other)), other) or 0))
    end
  end
  opened = {}
  read_on_where_due()
end

for pool in pairs(asked) do write_down(pool) end
if this.moved_on.turn > turn then redis.call('SET', K.turn(), int(this.moved_on.turn)) end

-- What this session has no room for: where there is more to take, somebody else is to look.
for i = 1, math.min(#heap, 20) do full[#full + 1] = heap[i][1] end
for i = 1, math.min(#full, 20) do
  local pool = full[i]
  local own = limits_of_pool(pool, default_capacity)
  if redis.call('EXISTS', K.ready(pool)) == 1 and not kept_by('pool:' .. pool, own, own.running) then
    wake_one(pool)
    break
  end
end
if taken < n then
  -- Not for pools of which it has no room for another: their hints are others'.
  local words = {}
  for word in string.gmatch(service, '%S+') do
    if not room[word] or room[word] > 0 then words[#words + 1] = word end
  end
  local parked = table.concat(words, ' ')
  redis.call('ZADD', K.parked(parked), this.now_ms, session)
  redis.call('SADD', K.services(), parked)
  if parked ~= s[3] then
    redis.call('HSET', K.session(session), 'parked', parked)
    if s[3] then unpark(session, s[3]) end
  end
end
tell_due()
if unfinished or (taken == n and asked_for > n) then reply[2] = '0' end
return reply
