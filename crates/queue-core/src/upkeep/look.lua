-- What is compared of the keys that must agree, aspect by aspect. `this.comparing` has whether what is found `repairs`, how long the record of
-- a finished job is kept, and the `findings`.

local LOOK = {}
do

local QUIET_S = MISSING_MS / 1000
-- Longer queues are not searched.
local LONGEST_SEARCHED = 100000

local function found(kind, what, sentence, repair)
  local own = this.comparing
  local fate = repair and (own.repairs and 'repaired' or 'repairable') or 'reported'
  if repair and own.repairs then apart(what, '', repair) end
  own.findings[#own.findings + 1] = {kind, what, sentence, fate}
end

local function holds(key, kind) return redis.call('TYPE', key).ok == kind end

-- Nobody has touched the key for as long as a producer may take from its first command to its last.
local function is_quiet(key) return (try('OBJECT', 'IDLETIME', key) or 0) >= QUIET_S end

-- Fields of a job, or nil where one of them is no short text.
local function short(id, ...)
  for _, name in ipairs({...}) do
    if redis.call('HSTRLEN', K.job(id), name) > 256 then return nil end
  end
  return redis.call('HMGET', K.job(id), ...)
end

-- A session can beat and take only if these fields are there.
local function lives(name)
  local s = try('HMGET', K.session(name), 'beat', 'take')
  return s and s[1] and s[2] and true or false
end

-- A claim whose text can be read, or nil.
local function sound_claim(id)
  local claim = claim_of(id)
  if claim and claim.session and claim.cost and claim.tag and tonumber(claim.fence) then return claim end
  return nil
end

local function in_list(queue, id)
  local length = try('LLEN', queue)
  return not length or length > LONGEST_SEARCHED or try('LPOS', queue, id)
end

-- Whether a job stands in the line of its user, or in the list where foreign producers push all of theirs.
local function in_queue(id, user)
  local line = line_by_hash(id, user)
  return in_list(queue_of(line, band_of(id)), id) or (K.queue(user) ~= queue_of(line) and in_list(K.queue(user), id))
end

-- Fields that say: an execution began, and nobody knows its end.
local function unclean(id, lost_worker)
  note_lost(id)
  return {'unclean', int(unclean_of(id) + 1), 'lost_worker', lost_worker}
end

-- The job has a claim that Drayman once gave it and that has not ended.
local function is_unsettled(fence, settled) return fence and fence ~= '' and fence ~= settled end

-- Gives back a job whose claim, if it had one, is lost.
local function return_lost(id, user, fields)
  take_out(K.wip(user), id)
  if redis.call('EXISTS', K.wip(user)) == 0 then try('SREM', K.wip_users(), user) end
  local kind = parts_of(line_by_hash(id, user))
  put_back(id, {user = user, pool = kind == 'sql' and 'sql:' or kind}, fields)
end

local function end_claim(id, claim)
  local held = redis.call('TYPE', K.job(id)).ok
  release(id, claim)
  if held == 'hash' then
    apart(id, claim.user, lose, id, claim)
  else
    set_aside(id, claim.user, 'it was claimed, but its key holds ' .. (held == 'none' and 'nothing' or 'a ' .. held))
    place_on(line_of(claim.pool, claim.user), claim.pool)
  end
  wake_one(claim.pool)
end

-- What a work list names and no claim covers. The entry shows that Drayman took the job, so no producer is waited for.
local function drop_work(name, id)
  redis.call('HDEL', K.work(name), id)
  if redis.call('HEXISTS', K.claims(), id) == 1 or not is_id(id) or not holds(K.job(id), 'hash') then return end
  local h = short(id, 'user', 'status', 'fallback_status', 'fence', 'settled')
  if not h or not h[1] or not is_user(h[1]) or redis.call('ZSCORE', K.due(), id) then return end
  local ran = h[2] == 'running' or (FINAL[h[2]] and h[3] == 'running')
  if ran and is_unsettled(h[4], h[5]) and not in_queue(id, h[1]) then return_lost(id, h[1], unclean(id, name)) end
end

function LOOK.keys(items)
  for i = 1, #items, 2 do
    local key, wanted = items[i], items[i + 1]
    local held = redis.call('TYPE', key).ok
    if held == 'none' then
      -- Gone since the scan.
    elseif wanted == '' then
      found('unknown-key', key, 'the key is none of Drayman\'s; nothing reads it')
    elseif held ~= wanted then
      found('wrong-type', key, 'the key holds a ' .. held .. ' instead of a ' .. wanted .. '; remove it by hand')
    end
  end
end

function LOOK.leader()
  if try('PTTL', K.leader()) == -1 then
    found('leader-lasting', K.leader(), 'the leadership has no end, so nobody could follow a leader that is gone',
      function() redis.call('PEXPIRE', K.leader(), 5000) end)
  end
end

do

-- Whether a session has a claim to a job.
local function has_claim(name, id)
  local claim = claim_of(id)
  return claim and claim.session == name
end

-- What stands in a session's work list: it, and ids.
function LOOK.work(items)
  local name = items[1]
  local is_alive = lives(name)
  for i = 2, #items do
    local id = items[i]
    if not has_claim(name, id) then
      -- That the session is gone is a finding of its own.
      if is_alive then
        found('work-unclaimed', id, 'the job stands in the work list of session ' .. name .. ', which has no claim to it',
          function() drop_work(name, id) end)
      elseif this.comparing.repairs then
        apart(id, '', drop_work, name, id)
      end
    end
  end
  if not is_alive and this.comparing.repairs and redis.call('HLEN', K.work(name)) == 0 then redis.call('SREM', K.sessions(), name) end
end

-- What a session is asked to cancel: it, and ids.
function LOOK.cancels(items)
  local name = items[1]
  if not lives(name) then return end
  for i = 2, #items do
    local id = items[i]
    if not has_claim(name, id) then
      found('cancel-stray', id, 'session ' .. name .. ' is asked to cancel the job, but has no claim to it',
        function() redis.call('SREM', K.cancels(name), id) end)
    end
  end
end

end

function LOOK.sessions(items)
  for _, name in ipairs(items) do
    local listed = redis.call('SISMEMBER', K.sessions(), name) == 1
    if lives(name) then
      if not listed then
        found('session-unlisted', name, 'the session lives, but does not stand among the sessions: nobody would see its death',
          function() redis.call('SADD', K.sessions(), name) end)
      end
    elseif listed or redis.call('HLEN', K.work(name)) > 0 or redis.call('EXISTS', K.session(name), K.cancels(name)) > 0 then
      -- What it has claimed has gone back as claims without a session; what else stands in its work list is looked at next.
      found('session-gone', name, 'the session has no registration, but others of its keys are left; its jobs go back',
        function()
          redis.call('DEL', K.session(name), K.cancels(name))
          if redis.call('HLEN', K.work(name)) == 0 then redis.call('SREM', K.sessions(), name) end
        end)
    end
  end
end

-- Whether the list of what is being worked on for a user names the job. In a very long one it is not searched for.
local function is_shown(id, user)
  local length = try('LLEN', K.wip(user))
  return not length or length >= 1000 or try('LPOS', K.wip(user), id)
end

function LOOK.claims(items)
  local orphans = {}
  for _, id in ipairs(items) do
    local claim = sound_claim(id)
    if not claim then
      if redis.call('HEXISTS', K.claims(), id) == 1 then
        found('claim-malformed', id, 'the claim cannot be read, so nobody can end the job under it',
          function() redis.call('HDEL', K.claims(), id) end)
      end
    elseif not lives(claim.session) then
      orphans[#orphans + 1] = {id, claim}
    else
      if redis.call('HEXISTS', K.work(claim.session), id) == 0 then
        found('claim-unlisted', id, 'the job is claimed by session ' .. claim.session .. ', but does not stand in its work list',
          -- As of no take, so that no repeated take hands it out.
          function() redis.call('HSET', K.work(claim.session), id, 0) end)
      end
      if is_sql(claim.pool) and not is_shown(id, claim.user) then
        found('wip-missing', id, 'the job runs, but the list of work in progress of ' .. claim.user .. ' does not name it',
          function() try('LPUSH', K.wip(claim.user), id) end)
      end
      local held = redis.call('TYPE', K.job(id)).ok
      if held ~= 'hash' then
        found('claim-jobless', id, 'the job is claimed by the live session ' .. claim.session .. ', but its key holds '
          .. (held == 'none' and 'nothing' or 'a ' .. held) .. '; its worker ends it')
      end
    end
  end
  -- The one taken last goes back first, so that the one taken first ends up foremost.
  table.sort(orphans, function(a, b) return tonumber(a[2].fence) > tonumber(b[2].fence) end)
  for _, orphan in ipairs(orphans) do
    local id, claim = orphan[1], orphan[2]
    found('claim-orphaned', id, 'the job is claimed by session ' .. claim.session .. ', which does not exist; it goes back',
      function() end_claim(id, claim) end)
  end
end

function LOOK.batches(items)
  for _, id in ipairs(items) do
    local go_on, show_anew = faults_of_batch(id, this.comparing.retention_ms)
    if go_on then found('batch-broken', id, 'something was done to the batch, and that broke off half way', go_on) end
    if show_anew then found('batch-view', id, 'the record of the batch shows other numbers than it has', show_anew) end
  end
end

function LOOK.missing(items)
  for _, entry in ipairs(items) do
    if not string.match(entry, '^(%S+) (.*)$') then
      found('missing-malformed', entry, 'an entry of the ids without a hash is not an id and a user',
        function() redis.call('ZREM', K.missing(), entry) end)
    end
  end
end

local function is_kept(id) return redis.call('EXISTS', K.job(id)) == 1 end

-- Whether a batch, all of whose rows are dealt, has a part that is gone, or none. Of many, some are looked at.
local function lacks_parts(id)
  local parts = redis.call('HRANDFIELD', K.batch_parts(id), 200)
  for _, part in ipairs(parts) do
    if not is_kept(part) then return true end
  end
  return #parts == 0
end

-- A batch that the scan found in no place. It stands in its line while rows are left to deal; then its parts are all there is of it.
local function look_at_batch(id, user, status)
  local b = redis.call('HMGET', K.batch(id), 'cursor', 'left')
  if status == 'held' or in_queue(id, user) then return end
  if b[1] then
    found('batch-lost', id, 'the batch has rows to deal, but stands in no line; it goes to the front of its own', function()
      local line = line_by_hash(id, user)
      if put_first(id, line) then place_and_wake(line) end
    end)
  elseif tonumber(b[2]) <= 0 and not is_kept(id .. ':files') then
    found('batch-unsettled', id, 'all rows of the batch have ended, and it has not', function()
      redis.call('HSET', K.job(id), 'status', 'running')
      settle_batch(id, this.comparing.retention_ms)
    end)
  elseif lacks_parts(id) then
    found('batch-parts-lost', id, 'the batch waits for rows that nobody is known to have; if it stays so, abort it')
  end
end

-- A flow never stands anywhere: its steps that are queued are all there is of it.
local function look_at_flow(id)
  local packed, user = unpack(redis.call('HMGET', K.flow_steps(id), 'plan', 'user'))
  local open = 0
  for number, step in ipairs(cmsgpack.unpack(packed)) do
    if state_of(redis.call('HGET', K.flow_steps(id), number)) == 'queued' then
      open = open + 1
      local job = at_work(id, step)
      local h = is_kept(job) and holds(K.job(job), 'hash') and (short(job, 'status', 'fallback_status', 'user') or {}) or nil
      if not h or h[3] ~= user then
        found('flow-stuck', id, 'the job of step ' .. step[1] .. ' is gone; the step has failed', function()
          end_step(id, number, 'failed', {ended_at = now(), error = 'its job is gone'})
        end)
      elseif is_over(h[1], h[2]) and redis.call('HEXISTS', K.claims(), job) == 0 then
        found('flow-stuck', id, 'step ' .. step[1] .. ' has ended, and the flow does not know', function() step_over(job, user, h[1]) end)
      end
    end
  end
  if open == 0 then
    found('flow-stuck', id, 'no step of the flow is left to run, and it has not ended', function() advance(id) end)
  end
end

-- A job that the scan found in no place. `quiet` was asked before the first read, which counts as a touch.
local function look_at_job(id, quiet)
  local job = K.job(id)
  if not is_id(id) or not holds(job, 'hash') or redis.call('HEXISTS', K.claims(), id) == 1
    or redis.call('ZSCORE', K.due(), id) then
    return
  end
  local h = short(id, 'user', 'status', 'fallback_status', 'fence', 'settled', 'enqueued_at', 'updated_at', 'worker', 'host')
  if not h then return end
  local user, status, fallback_status, fence, settled = h[1], h[2], h[3], h[4], h[5]
  local ours = fence or h[6]
  -- What Drayman has had in its hands says itself when it was last written.
  local written = h[7] or ''
  if ours and string.match(written, '^%d%d%d%d%-%d%d%-%d%dT') and written < iso(this.now_ms - MISSING_MS) then quiet = true end
  if not quiet then return end
  if is_over(status, fallback_status) then
    if redis.call('PTTL', job) == -1 and not (user and is_user(user) and in_queue(id, user)) then
      found('final-kept', id, 'the job has ended as ' .. status .. ', but its record has no end',
        function() file(id, user or '', status, MAX_REJECTED_MS) end)
    end
    return
  end
  if not user or not is_user(user) then
    if ours then found('job-ownerless', id, 'the job has not ended, and its hash names no valid user') end
    return
  end
  local part, of = part_named(id)
  if part and is_batch(of) and not part_of(id) then
    if not in_queue(id, user) then
      found('part-stray', id, 'the job is a part of a batch that does not know it', function() drop_part(of, id) end)
    end
    return
  end
  if is_batch(id) then return look_at_batch(id, redis.call('HGET', K.batch(id), 'user'), status) end
  if is_flow(id) then return look_at_flow(id) end
  if in_queue(id, user) or redis.call('ZSCORE', K.missing(), id .. ' ' .. user) then return end
  local ran = status == 'running' or (FINAL[status] and fallback_status == 'running')
  local holder = h[9] and try('GET', K.host_lock(h[9]))
  local foreign_host = holder and string.sub(holder, 1, 8) ~= 'drayman:'
  if status == 'scheduled' then
    found('scheduled-lost', id, 'the job is scheduled, but for no time; it is due now', function()
      redis.call('ZADD', K.due(), int(this.now_ms), id)
      publish(user, id, 'scheduled')
    end)
  elseif ran and is_unsettled(fence, settled) and not foreign_host then
    found('running-lost', id, 'the job says that it runs, but is neither claimed nor queued; it goes back',
      function() return_lost(id, user, unclean(id, h[8] or '')) end)
  elseif ran then
    found('running-foreign', id, 'the job says that it runs, but none of our workers has it; a foreign one may')
  elseif (status == 'pending' or not status or FINAL[status]) and ours then
    found('pending-lost', id, 'the job waits, but in no queue; it goes to the front of its own',
      function() return_lost(id, user, {}) end)
  elseif status == 'pending' then
    found('pending-unqueued', id, 'the job waits, but has not been pushed to a queue; push its id to run it')
  end
end

-- The sum of bytes of ended jobs, where it seems to be wrong. A larger book is not added up.
function LOOK.kept()
  if redis.call('HLEN', K.kept()) > LONGEST_SEARCHED then return end
  local sum, kept = 0, redis.call('HGETALL', K.kept())
  for i = 1, #kept, 2 do
    if kept[i] ~= '*' then sum = sum + (tonumber(kept[i + 1]) or 0) end
  end
  if sum ~= (tonumber(redis.call('HGET', K.kept(), '*') or 0)) or #kept == 2 then
    found('sum-wrong', K.kept(), 'the bytes of ended jobs are not what their entries add up to', function()
      redis.call('HSET', K.kept(), '*', int(sum))
      if redis.call('HLEN', K.kept()) == 1 then redis.call('DEL', K.kept()) end
    end)
  end
end

-- Whether a job that counts as delayed is. One whose place in the schedule is lost gets another one.
local function is_delayed(id)
  if redis.call('ZSCORE', K.due(), id) then return true end
  local h = holds(K.job(id), 'hash') and short(id, 'status')
  return h and h[1] == 'scheduled'
end

function LOOK.delayed(items)
  for _, id in ipairs(items) do
    if redis.call('HEXISTS', K.delayed(), id) == 1 and not is_delayed(id) then
      found('delayed-stray', id, 'the job counts as delayed, but is not scheduled',
        function() redis.call('HDEL', K.delayed(), id) end)
    end
  end
end

-- How many delayed jobs lines have, of those where that seems to be wrong. A larger book is not added up.
function LOOK.delays(items)
  if redis.call('HLEN', K.delayed()) > LONGEST_SEARCHED then return end
  local counts, delayed = {}, redis.call('HGETALL', K.delayed())
  for _, line in ipairs(items) do counts[line] = 0 end
  for i = 1, #delayed, 2 do
    local line = delayed[i + 1]
    if counts[line] and is_delayed(delayed[i]) then counts[line] = counts[line] + 1 end
  end
  for line, has in pairs(counts) do
    local says = redis.call('HGET', K.delays(), line)
    if (says or '0') ~= int(has) or (says and has == 0) then
      found('sum-wrong', line, 'the line is said to have ' .. (says or '0') .. ' delayed jobs and has ' .. int(has), function()
        if has > 0 then redis.call('HSET', K.delays(), line, int(has)) else redis.call('HDEL', K.delays(), line) end
      end)
    end
  end
end

function LOOK.due(items)
  for _, id in ipairs(items) do
    local held = redis.call('TYPE', K.job(id)).ok
    local function drop() unschedule(id) end
    if not redis.call('ZSCORE', K.due(), id) then
      -- Promoted since the scan.
    elseif held ~= 'hash' then
      local reason = 'its key holds ' .. (held == 'none' and 'nothing' or 'a ' .. held)
      found('due-stray', id, 'the job is scheduled, but ' .. reason, function()
        drop()
        set_aside(id, '', 'it was scheduled, but ' .. reason)
      end)
    elseif redis.call('HEXISTS', K.claims(), id) == 0 then
      -- One that somebody ended, or pushed before its time, is dropped when it is due.
      local quiet, h = is_quiet(K.job(id)), short(id, 'status', 'fallback_status', 'user')
      if quiet and h and h[1] ~= 'scheduled' and not is_over(h[1], h[2]) and not (h[3] and in_queue(id, h[3])) then
        found('due-stray', id, 'the job stands among the scheduled ones with the status ' .. (h[1] or 'none'), drop)
        look_at_job(id, quiet)
      end
    end
  end
end

function LOOK.jobs(items)
  for _, id in ipairs(items) do look_at_job(id, is_quiet(K.job(id))) end
end

function LOOK.finished(items)
  -- A record that went early shows only while all records of its age are still there.
  for _, id in ipairs(items) do
    local at = tonumber(redis.call('ZSCORE', K.finished(), id) or nil)
    local function drop() forget({id}) end
    local held = redis.call('TYPE', K.job(id)).ok
    local expires = tonumber(redis.call('ZSCORE', K.expiring(), id) or nil)
    local left = held == 'hash' and redis.call('PTTL', K.job(id)) or -1
    if id == '*' then
      -- The sum of what records occupy, no job.
    elseif (at or expires or redis.call('HEXISTS', K.kept(), id) == 1)
      and not (at and expires and redis.call('HEXISTS', K.kept(), id) == 1) then
      if left > 0 then
        found('final-unbooked', id, 'the books of ended jobs do not agree about the job',
          function() enter_books(id, at or this.now_ms, left) end)
      elseif held ~= 'hash' then
        found('finished-stray', id, 'the books of ended jobs do not agree about the job, and it has no record', drop)
      else
        local quiet, h = is_quiet(K.job(id)), short(id, 'status', 'fallback_status')
        if h and not is_over(h[1], h[2]) then
          found('finished-stray', id, 'the books of ended jobs name the job, which has the status ' .. (h[1] or 'none'), drop)
        end
        look_at_job(id, quiet)
      end
    elseif at and held ~= 'hash' then
      -- One whose time is over is the next upkeep's.
      if expires > this.now_ms then found('finished-stray', id, 'the job stands among the ended ones, but its record is gone', drop) end
    elseif at and redis.call('PTTL', K.job(id)) == -1 and redis.call('HEXISTS', K.claims(), id) == 0 then
      -- Records of ended jobs have an end, so only the others are read. One may wait again: it was submitted anew.
      local quiet, h = is_quiet(K.job(id)), short(id, 'status', 'fallback_status', 'user')
      if quiet and h and not is_over(h[1], h[2]) and not (h[3] and in_queue(id, h[3])) then
        found('finished-stray', id, 'the job stands among the ended ones with the status ' .. (h[1] or 'none'), drop)
      end
      look_at_job(id, quiet)
    end
  end
end

function LOOK.wip(items)
  for _, user in ipairs(items) do
    local wip = K.wip(user)
    local ids = try('LRANGE', wip, 0, 999)
    for _, id in ipairs(ids or {}) do
      local claim = sound_claim(id)
      local claimant = claim and is_sql(claim.pool) and claim.user
      if claimant ~= user then
        local quiet = is_quiet(K.job(id))
        local status, fallback_status = try('HGET', K.job(id), 'status'), try('HGET', K.job(id), 'fallback_status')
        -- One that still says `running` may be a foreign worker's.
        -- Nor is one that a foreign worker takes just now: that leaves the queue first.
        local ended = not status or is_over(status, fallback_status)
        local is_due = redis.call('ZSCORE', K.due(), id)
        if claimant or is_due or (status ~= 'running' and (ended or quiet or in_queue(id, try('HGET', K.job(id), 'user') or user))) then
          found('wip-stray', id, 'the list of work in progress of ' .. user .. ' names the job, which nobody works on',
            function() take_out(wip, id) end)
        end
      end
    end
    local indexed = try('SISMEMBER', K.wip_users(), user)
    local left = redis.call('EXISTS', wip)
    if ids and indexed and indexed ~= left then
      found('wip-index', user, 'the index of work in progress and the user\'s list do not agree',
        function() try(left == 1 and 'SADD' or 'SREM', K.wip_users(), user) end)
    end
  end
end

-- Whether what was kept from its turn will get another one: by the end of a pause or of a job, or by a take at the time that its
-- rate was told to have.
local function waits(whose, why, until_ms)
  if why == 'paused' or why == 'concurrency' then return true end
  local told = tonumber(redis.call('ZSCORE', K.throttled(), whose))
  return told ~= nil and told <= (until_ms or this.now_ms)
end

-- Numbers of a pool that scripts compare.
local NUMBERS = {'running', 'capacity', 'user_limit', 'v', 'newest', 'pass', 'concurrency', 'rate', 'period', 'weight'}

-- Calls back with each claim. It is the only look at all of them: for what is said of running jobs, and seems to be wrong.
local function each_claim(callback)
  for _, id in ipairs(redis.call('HKEYS', K.claims())) do
    local claim = sound_claim(id)
    if claim then callback(claim) end
  end
end

function LOOK.numbers(items)
  for _, pool in ipairs(items) do
    local key = K.pool(pool)
    for i, text in ipairs(redis.call('HMGET', key, unpack(NUMBERS))) do
      if text and not number_in(text, -math.huge, math.huge) then
        found('pool-malformed', pool, 'the pool\'s ' .. NUMBERS[i] .. ' is no number',
          function() redis.call('HDEL', key, NUMBERS[i]) end)
      end
    end
  end
end

-- Whether the user is ready though it has so many running jobs in the pool.
local function compare_ready(pool, user, has, user_limit)
  if has >= user_limit_of(pool, user_limit) and redis.call('ZSCORE', K.ready(pool), user) then
    found('ready-beyond-limit', user, 'the user is ready in pool ' .. pool .. ', but has as many running jobs as it may',
      function() redis.call('ZREM', K.ready(pool), user) end)
  end
end

-- Counts of running jobs, of pools where they seem to be wrong.
function LOOK.counts(items)
  local running, busy = {}, {}
  for _, pool in ipairs(items) do running[pool], busy[pool] = 0, {} end
  each_claim(function(claim)
    local mine = busy[claim.pool]
    if not mine then return end
    running[claim.pool] = running[claim.pool] + 1
    mine[claim.user] = (mine[claim.user] or 0) + 1
  end)
  for _, pool in ipairs(items) do
    local again, says_all, count = {}, redis.call('HGET', K.pool(pool), 'running') or '0', running[pool]
    if tonumber(says_all) ~= count then
      found('pool-miscount', pool, 'the pool counts ' .. says_all .. ' running jobs and has ' .. count,
        function() redis.call('HSET', K.pool(pool), 'running', count) end)
    end
    local counted, mine = {}, busy[pool]
    local flat = redis.call('HGETALL', K.busy(pool))
    for i = 1, #flat, 2 do counted[flat[i]] = flat[i + 1] end
    for user in pairs(mine) do counted[user] = counted[user] or '0' end
    for user, says in pairs(counted) do
      local has = mine[user] or 0
      if tonumber(says) ~= has then
        found('user-miscount', user, 'the user counts ' .. says .. ' running jobs in pool ' .. pool .. ' and has ' .. has,
          function()
            if has == 0 then redis.call('HDEL', K.busy(pool), user) else redis.call('HSET', K.busy(pool), user, has) end
            again[#again + 1] = user
          end)
        compare_ready(pool, user, has, redis.call('HGET', K.pool(pool), 'user_limit'))
      end
    end
    for _, user in ipairs(again) do
      if is_user(user) then place_and_wake(line_of(pool, user)) end
    end
  end
end

-- The users of whom jobs run in a pool: it, and they.
function LOOK.busy(items)
  local pool = items[1]
  local limit = redis.call('HGET', K.pool(pool), NUMBERS[3])
  for i = 2, #items do
    local runs = tonumber(redis.call('HGET', K.busy(pool), items[i])) or 0
    if runs > 0 then compare_ready(pool, items[i], runs, limit and number_in(limit, -math.huge, math.huge)) end
  end
end

function LOOK.pools(items)
  for _, pool in ipairs(items) do
    local key = K.pool(pool)
    local p = redis.call('HMGET', key, unpack(NUMBERS))
    local function number(i) return p[i] and number_in(p[i], -math.huge, math.huge) end
    -- Of many the caller names them, a page of them each time.
    local flat = redis.call('HLEN', K.busy(pool)) <= 50 and redis.call('HGETALL', K.busy(pool)) or {}
    for i = 1, #flat, 2 do
      compare_ready(pool, flat[i], tonumber(flat[i + 1]) or 0, number(3))
    end
    local owing = redis.call('ZRANGE', K.debt(pool), 0, 0, 'WITHSCORES')[2]
    if owing and not number(4) then
      found('pool-timeless', pool, 'users owe the pool something, but its virtual time is lost; it goes on from the least',
        function()
          local first = redis.call('ZRANGE', K.ready(pool), 0, 0, 'WITHSCORES')[2]
          redis.call('HSET', key, 'v', int(math.min(tonumber(owing), tonumber(first or owing))))
        end)
    end
    -- What is kept from its turn leaves the list until it is given another one. How many may run where the pool does not say
    -- so, only its workers know; but one in which nothing runs would wait for ever.
    local count = number(1) or 0
    local own = limits_of_pool(pool, math.max(count, 1))
    if redis.call('EXISTS', K.ready(pool)) == 1 and not redis.call('ZSCORE', K.pools(class_of(pool)), pool)
      and not waits('pool:' .. pool, kept_by('pool:' .. pool, own, count)) then
      found('pool-unlisted', pool, 'users are ready in the pool, but it does not stand among the pools with something to take',
        function()
          list_pool(pool)
          wake_one(pool)
        end)
    end
  end
end

function LOOK.classes(items)
  for _, class in ipairs(items) do
    if redis.call('EXISTS', K.pools(class)) == 1 and redis.call('SISMEMBER', K.classes(), class) == 0 then
      found('pool-unlisted', class, 'pools of the class have something to take, but it does not stand among the classes that have',
        function() redis.call('SADD', K.classes(), class) end)
    end
  end
end

function LOOK.parked(items)
  for _, service in ipairs(items) do
    for _, name in ipairs(redis.call('ZRANGE', K.parked(service), 0, 9999)) do
      if not lives(name) then
        found('parked-stray', name, 'the session is parked for ' .. service .. ', but does not exist',
          function() redis.call('ZREM', K.parked(service), name) end)
      end
    end
    if redis.call('EXISTS', K.parked(service)) == 1 and redis.call('SISMEMBER', K.services(), service) == 0 then
      found('service-unlisted', service, 'sessions are parked for the service, but no wake-up would look for them',
        function() redis.call('SADD', K.services(), service) end)
    end
  end
end

local function lift_and_wake(user)
  redis.call('ZREM', K.throttled(), 'user:' .. user)
  for _, pool in ipairs(lift(user, 1000)) do wake_one(pool) end
end

-- Users of whom lines are kept from their turn.
function LOOK.barred(items)
  for _, user in ipairs(items) do
    if redis.call('EXISTS', K.barred(user)) == 1 and not waits('user:' .. user, user_kept_by(user, limits_of(user))) then
      found('line-barred', user, 'lines of the user are kept from their turn by limits that allow it',
        function() lift_and_wake(user) end)
    end
  end
end

-- Lines: of SQL jobs, and of tasks.
function LOOK.lines(items)
  for _, line in ipairs(items) do
    local kind, user = parts_of(line)
    -- The index of users is shared with others, and is looked through all the time.
    if kind and kind ~= 'sql' then
      local there = redis.call('EXISTS', queue_of(line), K.high(line), K.low(line)) > 0
      local listed = try('SISMEMBER', K.lines(), line)
      if listed and (listed == 1) ~= there then
        found('line-index', line, 'the line and the index of those that are not empty do not agree',
          function() if there then index(line) else unindex(line) end end)
      end
    end
    if user and is_user(user) then
      local queue = head_queue(line)
      if redis.call('SISMEMBER', K.barred(user), line) == 0 and holds(queue, 'list') and is_quiet(queue) then
        local verdict, pool = look(redis.call('LINDEX', queue, -1), line)
        if verdict == 'ready' and not redis.call('ZSCORE', K.ready(pool), user)
          and (tonumber(redis.call('HGET', K.busy(pool), user) or 0) or 0)
            < user_limit_of(pool, redis.call('HGET', K.pool(pool), 'user_limit')) then
          found('queue-unnoticed', kind == 'sql' and user or line,
            'the user has waiting jobs, but has not been ready in pool ' .. pool .. ' for a minute',
            function()
              index(line)
              place_and_wake(line)
            end)
        end
      end
    end
  end
end

-- How many jobs users have running over all pools, of those where that seems to be wrong.
function LOOK.active(items)
  local counts = {}
  for _, user in ipairs(items) do counts[user] = 0 end
  each_claim(function(claim)
    if counts[claim.user] then counts[claim.user] = counts[claim.user] + 1 end
  end)
  for user, has in pairs(counts) do
    local says = redis.call('HGET', K.active(), user)
    if (says or '0') ~= int(has) or (says and has == 0) then
      found('user-miscount', user, 'the user counts ' .. (says or '0') .. ' running jobs over all pools and has ' .. int(has), function()
        if has == 0 then redis.call('HDEL', K.active(), user) else redis.call('HSET', K.active(), user, has) end
        lift_and_wake(user)
      end)
    end
  end
end

-- Unique keys whose holder is gone or has ended.
function LOOK.uniques(items)
  for _, key in ipairs(items) do
    if try('GET', K.unique(key)) and not holder_of(key) then
      found('unique-stray', key, 'the unique key names a job that does not hold it any more',
        function() redis.call('DEL', K.unique(key)) end)
    end
  end
end

function LOOK.schedules(items)
  for _, name in ipairs(items) do
    local h = try('HMGET', K.schedule(name), 'due', 'paused', 'cron')
    local stands = h and try('ZSCORE', K.schedules(), name)
    local belongs = h and (not h[2] and string.find(h[1] or '', '^%d+$') and h[1] or '+inf')
    if h and h[3] and stands ~= nil and tonumber(stands or '') ~= (tonumber(belongs) or math.huge) then
      found('schedule-unlisted', name, 'the schedule does not stand among the schedules where its next tick says',
        function() redis.call('ZADD', K.schedules(), belongs, name) end)
    end
  end
end

-- Records of jobs that applications run themselves. The name of a tracker has no colon.
function LOOK.tracked(items)
  for _, item in ipairs(items) do
    local tracker, id = string.match(item, '^([^:]*):(.*)$')
    local repair = tracker and faults_of_record(tracker, id)
    if repair then found('track-index', item, 'the indexes of the tracker do not agree with the record', repair) end
  end
end

end
