-- Submits jobs, many in one call.
-- ARGV: most SQL jobs and most tasks in one line, largest payload of each in bytes, 1 if replicas are to confirm it or 0,
--   then for each job: id, user, delay in ms, earliest time in ms (0 for none), number of fields and values, fields and values in turn.
--   The fields kind, app, op and priority say in which line it waits; unique, unique_scope ('queued', 'done' or 'period') and
--   unique_ms which key it holds that no other job may hold.
-- Reply: for each job 'queued', 'exists' (the id was submitted before: nothing was written), {'held', id} (that job holds its
--   unique key), {'full', limit}, {'too_large', bytes, most}, {'no_room', bytes of memory used, bytes above which nothing new
--   is accepted}, or {'refused', reason}
local most = {sql = tonumber(ARGV[1]), task = tonumber(ARGV[2])}
local largest = {sql = tonumber(ARGV[3]), task = tonumber(ARGV[4])}
-- The leader's word that memory is nearly full.
local used, mark = string.match(redis.call('GET', K.full()) or '', '^(%d+) (%d+)$')
local replies, wakes = {}, {}
-- A replica confirms what this very connection wrote: that a job exists was written by another, before this.
if ARGV[5] == '1' then redis.call('SET', K.confirming(), now(), 'PX', 60000) end
local i = 6
while i <= #ARGV do
  local id, user, m = ARGV[i], ARGV[i + 1], count_in(ARGV[i + 4])
  local delay = math.max(tonumber(ARGV[i + 2]), tonumber(ARGV[i + 3]) - this.now_ms)
  local fields = {unpack(ARGV, i + 5, i + 4 + m)}
  i = i + 5 + m
  local size, names, says, reply = 0, 0, {}, nil
  for f = 2, #fields, 2 do
    size = size + #fields[f]
    names = names + #fields[f - 1]
    says[fields[f - 1]] = fields[f]
  end
  local kind = says.kind == 'task' and 'task' or 'sql'
  local pool, fault = nil, nil
  if kind == 'task' then pool, fault = pool_of_task(says.app, says.op) end
  local line = line_of(pool or 'sql:', user)
  local queue = queue_of(line, says.priority)
  local length = try('LLEN', queue)
  -- The limit is that of the line, in whatever band its jobs stand.
  local waiting = tonumber(redis.call('HGET', K.delays(), line) or 0)
  for _, band in ipairs({'high', '', 'low'}) do waiting = waiting + (try('LLEN', queue_of(line, band)) or 0) end
  if redis.call('EXISTS', K.job(id)) == 1 then
    reply = 'exists'
  elseif fault then
    reply = {'refused', fault}
  elseif is_for_parts(id) then
    reply = {'refused', FOR_PARTS}
  elseif not length then
    reply = {'refused', 'the key of the queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list'}
  elseif waiting >= most[kind] then
    reply = {'full', most[kind]}
  elseif size > largest[kind] then
    reply = {'too_large', size, largest[kind]}
  elseif size + names > MAX_PAYLOAD then
    reply = {'too_large', size + names, MAX_PAYLOAD}
  elseif used then
    reply = {'no_room', used, mark}
  elseif says.unique and not take_unique(says.unique, says.unique_scope, tonumber(says.unique_ms or 0), id) then
    reply = {'held', holder_of(says.unique)}
  else
    redis.call('HSET', K.job(id), 'user', user, 'status', delay > 0 and 'scheduled' or 'pending', 'created_at', now(),
      'updated_at', now(), 'enqueued_at', now(), unpack(fields))
    -- Others may have removed the hash of a job of this id that was on the schedule. Not before the hash is written: memory
    -- is checked at the first write only.
    unschedule(id)
    if delay > 0 then
      redis.call('ZADD', K.due(), int(this.now_ms + delay), id)
      redis.call('HSET', K.delayed(), id, line)
      redis.call('HINCRBY', K.delays(), line, 1)
      publish(user, id, 'scheduled')
    else
      redis.call('LPUSH', queue, id)
      index(line)
      publish(user, id, 'pending')
      -- Whoever stands in the ready-set of a handler has its place, whatever its head.
      if not pool or not redis.call('ZSCORE', K.ready(pool), user) then
        local at, new = place(line)
        if new then wakes[at] = true end
      end
    end
    reply = 'queued'
  end
  replies[#replies + 1] = reply
end
for pool in pairs(wakes) do wake_one(pool) end
return replies
