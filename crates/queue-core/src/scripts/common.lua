-- Stands before every script, after the table K of keys and the constants MAX_* and FIELDS that Rust renders.
-- Words used here: a user's HEAD is the job at the right end of its queue; a CLAIM is the right to end a running job.

local FINAL = {done = true, failed = true, cancelled = true, ignored = true, unknown = true}

-- What stands in a pool whose host is another's to schedule.
local BLOCKED = 'a foreign worker schedules this host'

local clock = redis.call('TIME')
local now_us = clock[1] * 1000000 + clock[2]
local now_ms = math.floor(now_us / 1000)

-- Whole numbers beyond 10^14 lose digits in Lua's own conversion.
local function int(x) return string.format('%.0f', x) end

-- ISO 8601 in UTC with milliseconds, the form in which the hash of a job keeps times.
local function iso(ms)
  local days = math.floor(ms / 86400000)
  local rest = ms - days * 86400000
  -- Days since 1970 to a date, counted in 400-year eras that begin on 1 March.
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, day, math.floor(rest / 3600000),
    math.floor(rest / 60000) % 60, math.floor(rest / 1000) % 60, rest % 1000)
end

local now = iso(now_ms)

-- A command on a key that others may have made something else of: its reply, or nil if the key has another type.
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then return nil end
  return reply
end

-- Nothing more will run: the status is final, and so is that of the job-level fallback where the status waits for one.
local function is_over(status, fallback_status)
  if not FINAL[status] then return false end
  return status == 'cancelled' or (fallback_status ~= 'pending' and fallback_status ~= 'running')
end

local function covers(pattern, pool)
  if string.sub(pattern, -1) == '*' then
    return string.sub(pool, 1, #pattern - 1) == string.sub(pattern, 1, -2)
  end
  return pattern == pool
end

-- A service is the pool patterns that a session serves, separated by spaces.
local function serves(service, pool)
  for pattern in string.gmatch(service, '%S+') do
    if covers(pattern, pool) then return true end
  end
  return false
end

-- Says something on a channel, and returns how many heard it. Whoever may not publish still does the rest of the work.
local function tell(channel, text) return try('PUBLISH', channel, text) or 0 end

-- Tells one parked session that serves the pool. A hint: if it gets lost, the next scan finds the work.
local function wake_one(pool)
  for _, service in ipairs(redis.call('SMEMBERS', K.services())) do
    if serves(service, pool) then
      for _ = 1, 8 do
        local session = redis.call('ZPOPMIN', K.parked(service))[1]
        if not session then
          redis.call('SREM', K.services(), service)
          break
        end
        if tell(K.wake(session), pool) > 0 then return end
      end
    end
  end
end

-- Enters an id into the rejected list.
local function set_aside(id, user, reason)
  try('XADD', K.rejected(), 'MAXLEN', '~', 10000, '*', 'id', string.sub(id, 1, 256), 'user', string.sub(user, 1, 256),
    'reason', reason)
end

-- Writes fields of a job. A key that others have made something else of is left alone: the rejected list tells.
local function record(id, user, ...)
  if try('HSET', K.job(id), 'updated_at', now, ...) then return true end
  set_aside(id, user, 'its key became a ' .. redis.call('TYPE', K.job(id)).ok)
  return false
end

local function publish(user, id, status) tell(K.events(user), id .. ' ' .. status) end

-- Enters the record of an ended job into the books: when it ended, when it expires, what it occupies.
local function enter_books(id, ended_ms, retention_ms)
  redis.call('ZADD', K.finished(), int(ended_ms), id)
  redis.call('ZADD', K.expiring(), int(now_ms + retention_ms), id)
  -- A server may forbid the question: then records count by their number alone.
  local bytes = try('MEMORY', 'USAGE', K.job(id), 'SAMPLES', '0') or 0
  local before = tonumber(redis.call('HGET', K.kept(), id) or 0)
  redis.call('HSET', K.kept(), id, bytes)
  redis.call('HINCRBY', K.kept(), '*', bytes - before)
end

-- Files a job that reached its final status. Its password has served its purpose.
local function file(id, user, status, retention_ms)
  try('HDEL', K.job(id), 'pass')
  redis.call('PEXPIRE', K.job(id), retention_ms)
  enter_books(id, now_ms, retention_ms)
  publish(user, id, status)
end

-- Takes records out of the index of ended jobs and out of the books of what they occupy.
local function forget(ids)
  if #ids == 0 then return end
  local freed = 0
  for _, bytes in ipairs(redis.call('HMGET', K.kept(), unpack(ids))) do freed = freed + (tonumber(bytes) or 0) end
  redis.call('ZREM', K.finished(), unpack(ids))
  redis.call('ZREM', K.expiring(), unpack(ids))
  redis.call('HDEL', K.kept(), unpack(ids))
  if freed > 0 then redis.call('HINCRBY', K.kept(), '*', -freed) end
  if redis.call('HLEN', K.kept()) == 1 then redis.call('DEL', K.kept()) end
end

-- Takes a job off the schedule; where it was submitted with a delay, its user has one queued less.
local function unschedule(id)
  redis.call('ZREM', K.due(), id)
  local user = redis.call('HGET', K.delayed(), id)
  if not user then return end
  redis.call('HDEL', K.delayed(), id)
  if redis.call('HINCRBY', K.delays(), user, -1) <= 0 then redis.call('HDEL', K.delays(), user) end
end

-- Sets an id aside with its reason. The job's own hash is told too, but only where it is this user's: nobody can fail
-- another's job by queueing its id.
local function reject(id, user, reason, own_hash)
  set_aside(id, user, reason)
  if own_hash and record(id, user, 'status', 'failed', 'failed_reason', reason, 'ended_at', now) then
    if try('HGET', K.job(id), 'fallback_status') then record(id, user, 'fallback_status', 'skipped') end
    file(id, user, 'failed', MAX_REJECTED_MS)
  end
end

-- Whether the bytes of a text are valid UTF-8.
local function is_utf8(text)
  local at = string.find(text, '[\128-\255]')
  while at do
    local rest = string.sub(text, at, at + 3)
    local size = (string.find(rest, '^[\194-\223][\128-\191]') and 2)
      or (string.find(rest, '^\224[\160-\191][\128-\191]') and 3)
      or (string.find(rest, '^\237[\128-\159][\128-\191]') and 3)
      or (string.find(rest, '^[\225-\236\238\239][\128-\191][\128-\191]') and 3)
      or (string.find(rest, '^\240[\144-\191][\128-\191][\128-\191]') and 4)
      or (string.find(rest, '^[\241-\243][\128-\191][\128-\191][\128-\191]') and 4)
      or (string.find(rest, '^\244[\128-\143][\128-\191][\128-\191]') and 4)
    if not size then return false end
    at = string.find(text, '[\128-\255]', at + size)
  end
  return true
end

-- The same rules as those of the identifiers in Rust: what passes here must be readable there.
local CONTROL_C1 = '\194[\128-\159]'
local function is_id(id) return #id <= MAX_ID and string.find(id, '^[%w_.:-]+$') ~= nil end
local function is_user(user)
  return #user > 0 and #user <= MAX_USER and not string.find(user, '%c') and is_utf8(user)
    and not string.find(user, CONTROL_C1)
end

-- What a hash says of its place, as a part of a pool's name.
local function place_name(text)
  if not is_utf8(text) then text = string.gsub(text, '[\128-\255]', '?') end
  text = string.gsub(text, CONTROL_C1, '?')
  return (string.gsub(text, '[%c ]', '?'))
end

local NAMES = {}
for i = 1, #FIELDS, 2 do NAMES[#NAMES + 1] = FIELDS[i] end

-- The name, size and limit of a field that is too long, if there is one. Values are read only where the whole hash is small.
local function too_long(job)
  local bytes = redis.call('HLEN', job) <= 64 and try('MEMORY', 'USAGE', job, 'SAMPLES', '0')
  local values = bytes and bytes <= 65536 and redis.call('HMGET', job, unpack(NAMES))
  for i, name in ipairs(NAMES) do
    local most = FIELDS[2 * i]
    local size = values and #(values[i] or '') or not values and redis.call('HSTRLEN', job, name)
    if size > most then return name, size, most end
  end
end

-- What a queued id is worth: 'ready' with its pool, 'missing', 'drop' (claimed, or over with its status), or 'reject' with the reason and
-- whether the hash is the user's own. Sizes are asked before anything is read.
local function look(id, user)
  if not is_id(id) then return 'reject', 'its id is not made of letters, digits and _ . : -' end
  if redis.call('HEXISTS', K.claims(), id) == 1 then return 'drop' end
  local job = K.job(id)
  local held = redis.call('TYPE', job).ok
  if held == 'none' then return 'missing' end
  if held ~= 'hash' then return 'reject', 'its key holds a ' .. held .. ', not a hash' end
  if redis.call('HSTRLEN', job, 'user') > MAX_USER then return 'reject', 'its field user is too long' end
  local owner = redis.call('HGET', job, 'user')
  if owner and owner ~= '' and owner ~= user then return 'reject', 'it belongs to another user than its queue' end
  local field, size, most = too_long(job)
  if field then
    return 'reject', 'its field ' .. field .. ' is ' .. size .. ' bytes long, at most ' .. most .. ' are allowed', true
  end
  local h = redis.call('HMGET', job, 'status', 'fallback_status', 'database', 'host')
  if is_over(h[1], h[2]) then return 'drop', h[1] end
  if h[3] and h[3] ~= '' then return 'ready', 'db:' .. place_name(h[3]) end
  return 'ready', 'sql:' .. place_name(h[4] or '')
end

local missed = 0

-- The id at a user's head and its pool, after removing from the queue what can't run. Nil if nothing is left.
local function head(user)
  local queue = K.queue(user)
  for _ = 1, 100 do
    local id = redis.pcall('LINDEX', queue, -1)
    if type(id) == 'table' then
      try('SREM', K.queued_users(), user)
      reject('-', user, 'its queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list')
      return nil
    end
    if not id then
      try('SREM', K.queued_users(), user)
      return nil
    end
    local verdict, detail, own_hash = look(id, user)
    if verdict == 'ready' then return id, detail end
    redis.call('RPOP', queue)
    if verdict == 'reject' then
      reject(id, user, detail, own_hash)
    elseif verdict == 'drop' and detail and redis.call('PTTL', K.job(id)) == -1 then
      -- Somebody else ended it, and left it without a lifetime.
      file(id, user, detail, MAX_REJECTED_MS)
    elseif verdict == 'missing' then
      -- Fractions of a ms keep ids that are looked at together in their order.
      missed = missed + 1
      redis.call('ZADD', K.missing(), 'NX', string.format('%.3f', now_ms + MISSING_MS + missed / 1000), id .. ' ' .. user)
    end
  end
  -- A hundred unfit ids: the leader's next scan goes on.
  if redis.call('EXISTS', queue) == 0 then try('SREM', K.queued_users(), user) end
  return nil
end

-- Enters a user into a pool's ready-set unless it is there or at its limit. Start-time fair queueing: a user who owes nothing
-- starts at the pool's virtual time, each newcomer one unit behind the one before, so that ties go to who waited longest.
local function ready(pool, user)
  local p = redis.call('HMGET', K.pool(pool), 'v', 'newest', 'user_limit')
  if tonumber(redis.call('HGET', K.busy(pool), user) or 0) >= tonumber(p[3] or 1) then return false end
  if redis.call('ZSCORE', K.ready(pool), user) then
    -- Scans make it right, should the pool have left the list.
    redis.call('ZADD', K.pools(), 'NX', int(now_us), pool)
    return false
  end
  local v = tonumber(p[1] or 0)
  local start = tonumber(redis.call('ZSCORE', K.debt(pool), user) or 0)
  if start <= v then
    start = math.max(v, tonumber(p[2] or -1) + 1)
    redis.call('HSET', K.pool(pool), 'newest', int(start))
  end
  redis.call('ZADD', K.ready(pool), int(start), user)
  redis.call('ZADD', K.pools(), 'NX', int(now_us), pool)
  return true
end

-- Puts a user where its head says. Returns the pool, and whether the user is new there.
local function place(user)
  local id, pool = head(user)
  if not id then return nil end
  return pool, ready(pool, user)
end

local function weight_of(user)
  local weight = tonumber(try('HGET', K.limits(user), 'weight') or 1) or 1
  if weight ~= weight or weight < 0.001 or weight > 1000 then return 1 end
  return weight
end

local function claim_of(id)
  local text = redis.call('HGET', K.claims(), id)
  if not text then return nil end
  local session, fence, pool, user, cost, tag, by =
    string.match(text, '^([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)\t(.*)$')
  return {session = session, fence = fence, pool = pool, user = user, cost = tonumber(cost), tag = tonumber(tag), by = by}
end

-- What a job really cost replaces what its take charged: the user's finish tag moves by the difference. Where the pool's
-- virtual time has passed that tag, the claim still has it.
local function recharge(claim, cost)
  if cost == claim.cost then return end
  local v = tonumber(redis.call('HGET', K.pool(claim.pool), 'v') or 0)
  local tag = tonumber(redis.call('ZSCORE', K.debt(claim.pool), claim.user) or claim.tag)
  tag = tag + math.floor((cost - claim.cost) / weight_of(claim.user))
  if tag > v then
    redis.call('ZADD', K.debt(claim.pool), int(tag), claim.user)
  else
    redis.call('ZREM', K.debt(claim.pool), claim.user)
  end
  if redis.call('ZSCORE', K.ready(claim.pool), claim.user) then
    redis.call('ZADD', K.ready(claim.pool), int(math.max(v, tag)), claim.user)
  end
end

-- Ends a claim: all that the take did, undone. What becomes of the job is the caller's to write.
local function release(id, claim)
  redis.call('HDEL', K.claims(), id)
  redis.call('HDEL', K.work(claim.session), id)
  redis.call('SREM', K.cancels(claim.session), id)
  if redis.call('HGET', K.session(claim.session), 'suspect') == id then
    redis.call('HDEL', K.session(claim.session), 'suspect')
  end
  if redis.call('HINCRBY', K.pool(claim.pool), 'running', -1) < 0 then
    redis.call('HSET', K.pool(claim.pool), 'running', 0)
  end
  if redis.call('HINCRBY', K.busy(claim.pool), claim.user, -1) <= 0 then
    redis.call('HDEL', K.busy(claim.pool), claim.user)
  end
  try('LREM', K.wip(claim.user), 0, id)
  if redis.call('EXISTS', K.wip(claim.user)) == 0 then try('SREM', K.wip_users(), claim.user) end
  -- The pool has room again.
  if redis.call('EXISTS', K.ready(claim.pool)) == 1 then redis.call('ZADD', K.pools(), 'NX', int(now_us), claim.pool) end
end

-- Puts a job at the front of its user's queue.
local function put_first(id, user)
  if try('RPUSH', K.queue(user), id) then
    try('SADD', K.queued_users(), user)
    return true
  end
  reject(id, user, 'its queue holds a ' .. redis.call('TYPE', K.queue(user)).ok .. ', not a list', true)
  return false
end

-- Enters a user where its head says. Where that is not `pool`, somebody who serves it may be parked.
local function place_on(user, pool)
  local at, new = place(user)
  if new and at ~= pool then wake_one(at) end
end

-- Puts a job whose claim is gone at the front of its queue as if it had not been taken, with `extra` fields and values.
local function put_back(id, claim, extra)
  local status = try('HGET', K.job(id), 'status')
  local fields = {unpack(extra)}
  if try('HGET', K.job(id), 'fallback_status') == 'running' then
    fields[#fields + 1] = 'fallback_status'
    fields[#fields + 1] = 'pending'
  end
  if not FINAL[status] then
    fields[#fields + 1] = 'status'
    fields[#fields + 1] = 'pending'
  end
  if record(id, claim.user, 'user', claim.user, unpack(fields)) and put_first(id, claim.user) then
    publish(claim.user, id, 'pending')
  end
  place_on(claim.user, claim.pool)
end

-- Gives a claimed job back to the front of its queue.
local function give_back(id, claim, extra)
  release(id, claim)
  put_back(id, claim, extra)
end

-- How often the job's worker was lost while it ran. What is not written as a count is none.
local function unclean_of(id)
  local text = redis.call('HSTRLEN', K.job(id), 'unclean') <= 16 and redis.call('HGET', K.job(id), 'unclean')
  return text and string.find(text, '^%d+$') and tonumber(text) or 0
end

-- A job's history with one more entry, the oldest dropped.
local function history_with(id, entry)
  local text = try('HSTRLEN', K.job(id), 'history') or 0
  text = text <= MAX_HISTORY and try('HGET', K.job(id), 'history') or ''
  text = text .. (text == '' and '' or '\n') .. cjson.encode(entry)
  while #text > MAX_HISTORY do text = string.sub(text, (string.find(text, '\n', 1, true) or #text) + 1) end
  return text
end

-- A claimed job whose worker is gone: an unclean end. It goes back to the front of its queue, for whoever takes it next to
-- settle what was begun; but for one that ends its workers before they can even look at it.
local function lose(id, claim)
  if redis.call('TYPE', K.job(id)).ok ~= 'hash' then return give_back(id, claim, {}) end
  local unclean = unclean_of(id) + 1
  local fields = {'unclean', int(unclean), 'lost_worker', claim.session, 'history', history_with(id,
    {unclean = true, worker = claim.session, ended_at = now, error = 'its worker was lost'})}
  if unclean < MAX_UNCLEAN then return give_back(id, claim, fields) end
  release(id, claim)
  local begun = (try('HGET', K.job(id), 'trace') or '') ~= ''
  if record(id, claim.user, 'user', claim.user, 'status', begun and 'unknown' or 'ignored', 'ended_at', now,
    'failed_reason', 'it ended ' .. int(unclean) .. ' workers, the last one ' .. claim.session, unpack(fields)) then
    if try('HGET', K.job(id), 'fallback_status') then record(id, claim.user, 'fallback_status', 'skipped') end
    file(id, claim.user, begun and 'unknown' or 'ignored', MAX_REJECTED_MS)
  end
  place_on(claim.user, claim.pool)
end

-- Whether somebody has cancelled a claimed job by writing its hash, the only way that foreign cancellers know. Nobody writes
-- `cancelled` under a claim of ours before it ends.
local function cancelled_by_hash(id) return try('HGET', K.job(id), 'status') == 'cancelled' end

-- Refuses what is not, or no longer, the leader's to do.
local function leads(session, term) return redis.call('GET', K.leader()) == session .. '\t' .. term end

-- A scheduled job is due: it joins the front of its user's queue, for it has waited longest.
local function promote(id)
  unschedule(id)
  if redis.call('HEXISTS', K.claims(), id) == 1 then return end
  local held = redis.call('TYPE', K.job(id)).ok
  if held ~= 'hash' then
    set_aside(id, '', 'it was due, but its key holds ' .. (held == 'none' and 'nothing' or 'a ' .. held))
    return
  end
  local h = redis.call('HMGET', K.job(id), 'user', 'status', 'fallback_status')
  if h[2] ~= 'scheduled' then
    -- Somebody else ended it, and left it without a lifetime.
    if is_over(h[2], h[3]) and redis.call('PTTL', K.job(id)) == -1 then file(id, h[1] or '', h[2], MAX_REJECTED_MS) end
    return
  end
  if not h[1] or not is_user(h[1]) then
    reject(id, h[1] or '', 'it was due, but its hash names no valid user', true)
    return
  end
  if record(id, h[1], 'status', 'pending') and put_first(id, h[1]) then
    publish(h[1], id, 'pending')
    local pool, new = place(h[1])
    if new then wake_one(pool) end
  end
end

-- Promotes what is due. Of many the one due first goes last, so that it ends up foremost.
local function promote_due(most)
  local ids = redis.call('ZRANGEBYSCORE', K.due(), '-inf', now_ms, 'LIMIT', 0, most)
  for i = #ids, 1, -1 do promote(ids[i]) end
  return #ids
end
