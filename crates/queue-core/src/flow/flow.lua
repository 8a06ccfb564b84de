-- What follows when a step of a flow has ended. A FLOW is a job of kind 'flow' that is
-- never claimed itself. Its steps are jobs of its user, '<flow>:<name of the step>', and each is queued in the same moment in which
-- what it comes after has ended. K.flow_steps says of each step, by its number, its state and what became of it:
--   waiting (what it comes after has not ended), queued (its job is there), done, failed, cancelled, skipped (it was not to run)
-- The job of a step that is a BATCH loads rows into a held batch, '<flow>:<name of the step>:rows'. When it is done they are released,
-- and the step ends with the batch.

-- What is done with the rows of a step. Who has anything to do with batches has their text.
local release_rows, abort_rows
-- Lua has room for 200 names at a time: those that only this file uses are not kept.
local state_of, facts_of, set_step, rows_of_step, at_work, advance, end_step, stop_flow
do

function state_of(entry) return string.match(entry or '', '^%a+') end

-- What is known of a step beside its state.
function facts_of(entry) return cjson.decode(string.match(entry or '', ' (.*)$') or '{}') end

function set_step(key, number, state, facts)
  redis.call('HSET', key, number, state .. ' ' .. cjson.encode(facts))
end

local function job_of_step(flow, step) return flow .. ':' .. step[1] end
function rows_of_step(flow, step) return step[4] == 'batch' and job_of_step(flow, step) .. ':rows' or nil end

-- What a step is working on: its job, or the rows that it has released.
function at_work(flow, step)
  local rows = rows_of_step(flow, step)
  return rows and is_batch(rows) and try('HGET', K.job(rows), 'flow') == flow and rows or job_of_step(flow, step)
end

-- Whether a step is to run now, or never: 'run', 'skip', or nil while what it comes after has not ended.
local function turn_of(step, states)
  local _, after, on = unpack(step)
  local count = {done = 0, failed = 0, cancelled = 0, skipped = 0, waiting = 0, queued = 0}
  for _, number in ipairs(after) do count[states[number]] = count[states[number]] + 1 end
  if count.waiting + count.queued > 0 then return nil end
  if on == 'ended' then return 'run' end
  if on == 'failed' then return count.failed > 0 and 'run' or 'skip' end
  -- What was not to run keeps nobody, if another did.
  return count.failed + count.cancelled == 0 and (count.done > 0 or #after == 0) and 'run' or 'skip'
end

-- How a flow ends: what failed is forgiven where a step that follows failures has followed it, and is done.
local function end_of(plan, states, is_stopped)
  local forgiven, failed = {}, nil
  for number, step in ipairs(plan) do
    if states[number] == 'cancelled' or (is_stopped and states[number] == 'waiting') then return 'cancelled' end
    if step[3] == 'failed' and states[number] == 'done' then
      for _, before in ipairs(step[2]) do forgiven[before] = true end
    end
  end
  for number in ipairs(plan) do
    if states[number] == 'failed' and not forgiven[number] then failed = failed or number end
  end
  return failed and 'failed' or 'done', failed
end

local COUNTS = {'read_count', 'write_count', 'filter_count', 'skip_count', 'commit_count', 'rollback_count'}

-- A flow and its steps for the feed, each '<name> <state> <facts>' under its number; of what a handler has saved the counts alone.
local function told_of(flow, plan)
  local fields = fed_of(K.job(flow))
  for number, step in ipairs(plan) do
    local entry = redis.call('HGET', K.flow_steps(flow), number)
    local facts = facts_of(entry)
    local sound, saved = pcall(cjson.decode, facts.saved or facts.checkpoint or '')
    for _, name in ipairs(sound and type(saved) == 'table' and COUNTS or {}) do facts[name] = tonumber(saved[name]) end
    facts.saved, facts.checkpoint, facts.checkpoint_of = nil, nil, nil
    fields[#fields + 1] = 'step:' .. number
    fields[#fields + 1] = step[1] .. ' ' .. state_of(entry) .. ' ' .. cjson.encode(facts)
  end
  return fields
end

local function end_flow(flow, plan, states, f)
  local job, key = K.job(flow), K.flow_steps(flow)
  local user, keep_ms = f.user, tonumber(f.keep)
  local status, failed = end_of(plan, states, f.is_stopped)
  redis.call('HSET', job, 'status', status, 'ended_at', now(), 'updated_at', now())
  if failed then
    local facts = facts_of(redis.call('HGET', key, failed))
    redis.call('HSET', job, 'failed_reason', 'step ' .. plan[failed][1] .. ' failed' .. (facts.error and ': ' .. facts.error or ''))
  end
  feed('flow', flow, function() return told_of(flow, plan) end)
  local jobs = {}
  for number in ipairs(plan) do jobs[number] = 'job:' .. number end
  redis.call('HDEL', key, unpack(jobs))
  redis.call('PEXPIRE', key, keep_ms)
  redis.call('PEXPIRE', K.flow_instance(f.instance), keep_ms)
  file(flow, user, status, keep_ms, true, try('MEMORY', 'USAGE', key, 'SAMPLES', '0') or 0)
end

local function queue_step(flow, user, number, name)
  local id, fields = flow .. ':' .. name, cmsgpack.unpack(redis.call('HGET', K.flow_steps(flow), 'job:' .. number))
  -- Whatever somebody else may have put there.
  redis.call('DEL', K.job(id))
  redis.call('HSET', K.job(id), 'user', user, 'status', 'pending', 'created_at', now(), 'updated_at', now(), 'enqueued_at', now(),
    'flow', flow, 'flow_step', number, unpack(fields))
  local line = line_by_hash(id, user)
  local queue = queue_of(line, band_of(id))
  if not try('LPUSH', queue, id) then
    return reject(id, user, 'its queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list', true)
  end
  index(line)
  publish(user, id, 'pending')
  place_and_wake(line)
end

-- Queues what is to run now, and ends a flow in which nothing is.
function advance(flow)
  local job, key = K.job(flow), K.flow_steps(flow)
  local h, own = try('HMGET', job, 'status', 'stop_requested_at'), try('HMGET', key, 'plan', 'user', 'keep', 'instance')
  if not h or h[1] ~= 'running' or not own or not own[1] then return end
  local f = {is_stopped = h[2], user = own[2], keep = own[3], instance = own[4]}
  local plan, numbers, states = cmsgpack.unpack(own[1]), {}, {}
  for number in ipairs(plan) do numbers[number] = number end
  for number, entry in ipairs(redis.call('HMGET', key, unpack(numbers))) do states[number] = state_of(entry) end
  local queued, is_open = {}, false
  -- Each step stands behind those that it comes after.
  for number, step in ipairs(plan) do
    local turn = states[number] == 'waiting' and turn_of(step, states)
    if turn == 'skip' then
      states[number] = 'skipped'
      local facts = facts_of(redis.call('HGET', key, number))
      set_step(key, number, 'skipped', {ended_at = now(), checkpoint = facts.checkpoint, checkpoint_of = facts.checkpoint_of,
        earlier = facts.earlier})
    elseif turn == 'run' and not f.is_stopped then
      states[number] = 'queued'
      set_step(key, number, 'queued', {queued_at = now()})
      queued[#queued + 1] = number
    end
    if states[number] == 'queued' then is_open = true end
  end
  redis.call('HSET', job, 'updated_at', now())
  if not is_open then return end_flow(flow, plan, states, f) end
  -- At last: one that can't be queued has ended, and comes back here.
  for _, number in ipairs(queued) do queue_step(flow, f.user, number, plan[number][1]) end
end

-- A step has ended, as nobody need say twice: one that is not queued is not this flow's any more.
function end_step(flow, number, state, facts)
  local key = K.flow_steps(flow)
  local entry = try('HGET', key, number) or ''
  if state_of(entry) ~= 'queued' then return end
  local before = facts_of(entry)
  facts.queued_at, facts.started_at = before.queued_at, before.started_at or facts.started_at
  set_step(key, number, state, facts)
  advance(flow)
end

-- What the hash of a step's job, or of its rows, says of how it went: these fields, unless others have made more of them.
local OF_JOB = {started_at = 64, attempts = 64, unclean = 64, failed_reason = MAX_HISTORY, history = MAX_HISTORY, checkpoint = MAX_CHECKPOINT,
  checkpoint_of = 512}
local OF_ROWS = {started_at = 64, rows = 64, done = 64, skipped = 64, failed = 64, aborted = 64, failed_reason = MAX_HISTORY}

local function facts_of_job(id, status, fields)
  local job, facts = K.job(id), {ended_at = now(), status = status}
  for name, most in pairs(fields) do
    if (try('HSTRLEN', job, name) or 0) <= most then facts[name] = redis.call('HGET', job, name) or nil end
  end
  facts.error, facts.failed_reason = facts.failed_reason and string.sub(facts.failed_reason, 1, 1024), nil
  return facts
end

-- The rows of a step are loaded: they are worked on from now on, and the step ends with them. False if they are not there.
local function begin_rows(flow, number, rows, said)
  local key = K.flow_steps(flow)
  local is_theirs = redis.call('HGET', K.batch(rows), 'user') == redis.call('HGET', key, 'user')
  if not release_rows or not is_theirs or try('HGET', K.job(rows), 'status') ~= 'held' then return false end
  local facts = facts_of(redis.call('HGET', key, number))
  facts.started_at, facts.earlier = said.started_at, said.earlier
  set_step(key, number, 'queued', facts)
  redis.call('HSET', K.job(rows), 'flow', flow, 'flow_step', number)
  local is_stopped = try('HGET', K.job(flow), 'stop_requested_at')
  if is_stopped then abort_rows(rows, MAX_REJECTED_MS) else release_rows(rows, MAX_REJECTED_MS) end
  return true
end

step_over = function(id, user, status)
  local flow, number = unpack(try('HMGET', K.job(id), 'flow', 'flow_step') or {})
  local own = flow and number and #flow <= MAX_ID and try('HMGET', K.flow_steps(flow), 'plan', 'user') or {}
  local step = own[1] and own[2] == user and cmsgpack.unpack(own[1])[number_in(number, 1, MAX_COUNT)]
  -- Others may have written into a hash of their own that it is a step.
  if not step then return end
  local rows = rows_of_step(flow, step)
  local is_rows = id == rows
  if not is_rows and id ~= job_of_step(flow, step) then return end
  local facts = facts_of_job(id, status, is_rows and OF_ROWS or OF_JOB)
  if rows and not is_rows then
    if (try('HSTRLEN', K.job(id), 'earlier') or 0) <= MAX_EARLIER then facts.earlier = redis.call('HGET', K.job(id), 'earlier') or nil end
    if status == 'done' then
      if begin_rows(flow, number, rows, facts) then return end
      status, facts.error = 'failed', 'the rows that it loaded are gone'
    elseif abort_rows and is_batch(rows) and try('HGET', K.job(rows), 'status') == 'held' then
      -- What was loaded of them is nobody's.
      abort_rows(rows, MAX_REJECTED_MS)
    end
    facts.checkpoint, facts.checkpoint_of = nil, nil
  elseif is_rows then
    -- Another execution need not repeat what is done of them.
    local earlier = facts_of(redis.call('HGET', K.flow_steps(flow), number)).earlier
    facts.earlier = status ~= 'done' and string.sub((earlier and earlier .. ' ' or '') .. rows, -MAX_EARLIER) or nil
    if status == 'failed' and not facts.error then
      facts.error = table.concat(redis.call('HMGET', K.batch(rows), 'failed', 'rows'), ' of ') .. ' rows failed'
    end
  end
  -- Where it was not done, another execution goes on from there.
  if status == 'done' then facts.saved, facts.checkpoint, facts.checkpoint_of = facts.checkpoint, nil, nil end
  local state = (status == 'done' or status == 'cancelled') and status or 'failed'
  end_step(flow, number, state, facts)
end

-- Queues no more steps of a flow, and cancels those that wait, and those that can go on later from what they have saved; with
-- `is_hard` all that run. Returns {'stopped'}, {'stopping'} while
-- some run, {'over', status} or {'missing'}.
function stop_flow(flow, is_hard)
  local job, key = K.job(flow), K.flow_steps(flow)
  local status, own = try('HGET', job, 'status'), try('HMGET', key, 'plan', 'user')
  if not status or not own or not own[1] then return {'missing'} end
  if FINAL[status] then return {'over', status} end
  redis.call('HSETNX', job, 'stop_requested_at', now())
  for number, step in ipairs(cmsgpack.unpack(own[1])) do
    if state_of(redis.call('HGET', key, number)) == 'queued' then
      local id = at_work(flow, step)
      local claim = claim_of(id)
      if id == rows_of_step(flow, step) then
        abort_rows(id, MAX_REJECTED_MS)
      elseif claim then
        if is_hard or (try('HSTRLEN', K.job(id), 'checkpoint') or 0) > 0 then
          try('HSETNX', K.job(id), 'cancel_requested_at', now())
          ask_to_cancel(id, claim)
        end
      elseif (try('HSTRLEN', K.job(id), 'trace') or 0) > 0 then
        cancel_when_settled(id)
      else
        withdraw(id, own[2], MAX_REJECTED_MS)
      end
    end
  end
  advance(flow)
  status = redis.call('HGET', job, 'status')
  return {FINAL[status] and 'stopped' or 'stopping'}
end

end
