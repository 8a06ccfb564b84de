-- What functions of several capabilities share, behind the keys, the constants and begin.lua.
-- Words used here: a LINE is what one user has waiting of one kind: 'sql:<user>' its SQL jobs over all databases,
-- '<app>.<op>:<user>' its tasks for one handler. Its HEAD is the job whose turn is next. A CLAIM is the right to end a
-- running job.

local FINAL = {done = true, failed = true, cancelled = true, ignored = true, unknown = true}

-- What stands in a pool whose host is another's to schedule.
local BLOCKED = 'a foreign worker schedules this host'

-- What an error says that the values of one job have caused, for want of what a command expects. Any other concerns all, and is raised: a
-- server that takes no writes, a script that is killed.
local fault_of
do
local OF_VALUES = {'WRONGTYPE', 'not an integer', 'not a valid float', 'would overflow', 'invalid expire', 'attempt to', 'bad argument'}
function fault_of(fault)
  local text = type(fault) == 'table' and fault.err or tostring(fault)
  for _, said in ipairs(OF_VALUES) do
    if string.find(text, said, 1, true) then return 'a script failed at what it says: ' .. string.sub(text, 1, 200) end
  end
  error(fault, 0)
end
end

-- A command on a key that others may have made something else of: its reply, or nil if the key has another type.
local function try(...)
  local reply = redis.pcall(...)
  if type(reply) == 'table' and reply.err then return nil end
  return reply
end

-- Takes an id out of a list that others write, too. A long one is nobody's work: of that only the front is searched.
local function take_out(list, id)
  local is_long = (try('LLEN', list) or 0) > 1000
  if is_long and not try('LPOS', list, id, 'MAXLEN', 1000) then return end
  try('LREM', list, is_long and 1 or 0, id)
end

-- Nothing more will run: the status is final, and so is that of the job-level fallback where the status waits for one.
local function is_over(status, fallback_status)
  if not FINAL[status] then return false end
  return status == 'cancelled' or (fallback_status ~= 'pending' and fallback_status ~= 'running')
end

-- Somebody has cancelled it by writing its hash, and a lost worker's execution may have taken effect: it stays cancelled, and whoever
-- takes it next finds out what was done.
local function is_to_be_settled(status, trace) return status == 'cancelled' and trace and trace ~= '' end

local function covers(pattern, pool)
  if string.sub(pattern, -1) == '*' then
    return string.sub(pool, 1, #pattern - 1) == string.sub(pattern, 1, -2)
  end
  return pattern == pool
end

local function is_sql(pool) return string.find(pool, '^sql:') ~= nil or string.find(pool, '^db:') ~= nil end

-- The class of a pool: what a pattern covers whole. Hosts are one, databases, and the handlers of each application.
local function class_of(pool)
  return string.match(pool, '^sql:') or string.match(pool, '^db:') or string.match(pool, '^[^.]*%.') or pool
end

-- The line in which a user's jobs of a pool wait. The pool of a handler has no colon, so the first one ends it.
local function line_of(pool, user) return (is_sql(pool) and 'sql:' or pool .. ':') .. user end

-- A line's kind ('sql', or the pool of its handler) and its user.
local function parts_of(line) return string.match(line, '^([^:]*):(.*)$') end

-- The list of a line in a band: 'high', 'low', or nothing for the one between.
local function queue_of(line, band)
  if band == 'high' then return K.high(line) end
  if band == 'low' then return K.low(line) end
  local kind, user = parts_of(line)
  if kind == 'sql' then return K.queue(user) end
  return K.tasks(line)
end

-- Enters a line into the index of those that are not empty, or takes it out: then the turns of its bands begin anew too.
local function index(line)
  local kind, user = parts_of(line)
  if kind == 'sql' then return try('SADD', K.queued_users(), user) end
  return try('SADD', K.lines(), line)
end
local function unindex(line)
  local kind, user = parts_of(line)
  redis.call('HDEL', K.bands(), line)
  if kind == 'sql' then return try('SREM', K.queued_users(), user) end
  return try('SREM', K.lines(), line)
end

-- A service is the pool patterns that a session serves, separated by spaces. It is taken apart once a call, into the names of
-- single pools and what covers many: a worker may have a thousand handlers, and is asked about as many pools.
local function service_parts(service)
  local own = this.services[service]
  if not own then
    own = {exact = {}, open = {}, names = {}}
    for pattern in string.gmatch(service, '%S+') do
      if string.sub(pattern, -1) == '*' then
        own.open[#own.open + 1] = pattern
      else
        local class = class_of(pattern)
        own.exact[pattern] = true
        own.names[class] = own.names[class] or {}
        table.insert(own.names[class], pattern)
      end
    end
    this.services[service] = own
  end
  return own
end

local function serves(service, pool)
  local own = service_parts(service)
  if own.exact[pool] then return true end
  for _, pattern in ipairs(own.open) do
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

-- Takes a session out of those that are parked for a service.
local function unpark(session, service)
  redis.call('ZREM', K.parked(service), session)
  if redis.call('EXISTS', K.parked(service)) == 0 then redis.call('SREM', K.services(), service) end
end

-- Enters an id into the rejected list.
local function set_aside(id, user, reason)
  try('XADD', K.rejected(), 'MAXLEN', '~', 10000, '*', 'id', string.sub(id, 1, 256), 'user', string.sub(user, 1, 256),
    'reason', reason)
end

-- Writes fields of a job. A key that others have made something else of is left alone: the rejected list tells.
local function record(id, user, ...)
  if try('HSET', K.job(id), 'updated_at', now(), ...) then return true end
  set_aside(id, user, 'its key became a ' .. redis.call('TYPE', K.job(id)).ok)
  return false
end

local function publish(user, id, status) tell(K.events(user), id .. ' ' .. status) end

-- Batches, their parts and flows are made by scripts of ours only. What the hash of a job says is no proof, for anybody may write one: they
-- are those that our own keys know.
local function is_batch(id) return redis.call('EXISTS', K.batch(id)) == 1 end
local function is_flow(id) return try('HEXISTS', K.flow_steps(id), 'plan') == 1 end

-- What an id would name if it were a part of a batch: 'rows', 'files' or 'done', the batch, and of rows their block and the first of them.
local function part_named(id)
  if not string.find(id, ':', 1, true) then return nil end
  local batch, what = string.match(id, '^(.+):(%a+)$')
  if what == 'files' or what == 'done' then return what, batch end
  local block, first
  batch, block, first = string.match(id, '^(.+):(%d+%.%d+):(%d+)$')
  if batch then return 'rows', batch, block, tonumber(first) end
end

-- Whether an id is kept for the parts of a batch, which may be made at any time. Steps of flows have ids of their own.
local FOR_PARTS = 'its id is one of those that parts of batches have'
local function is_for_parts(id)
  local what, batch = part_named(id)
  return what ~= nil and try('HEXISTS', K.flow_steps(batch), 'user') ~= 1
end

-- The same of a part that there is, with how many rows it has; nil of all else. An abort takes all parts from its batch: so what ends behind
-- it counts no more.
local function part_of(id)
  local what, batch, block, first = part_named(id)
  if not what or not is_batch(batch) then return nil end
  local count
  if what == 'done' then
    count = redis.call('HGET', K.batch(batch), 'over')
  elseif redis.call('HGET', K.batch(batch), 'ended') ~= id then
    count = redis.call('HGET', K.batch_parts(batch), id)
  end
  if count then return what, batch, block, first, tonumber(count) end
end

-- How a worker is told what a part is; false where a job is none.
local function part_text(id, said)
  local what, batch, block, first, count = part_of(id)
  if what ~= 'rows' then return what and what .. ' ' .. batch or false end
  local partial = string.find(said or '', ' partial$') and ' partial' or ''
  return table.concat({what, batch, block, int(first), int(count)}, ' ') .. partial
end

-- The FEED is what has ended and is to be written to a database, as it was then: it may be begun anew or removed before anybody reads
-- the entry.
local feed, fed_of, feed_job
do

-- Most entries of it; false where nobody writes them anywhere. Asked once a call.
local function most_fed()
  if this.most_fed == nil then this.most_fed = tonumber(try('HGET', K.exporting(), 'max_pending') or nil) or false end
  return this.most_fed
end

-- The fields of a record that are told, and how many bytes of them.
local FED = {
  'user', 128, 'status', 32, 'fallback_status', 32, 'app', 64, 'op', 128, 'host', 255, 'database', 128,
  'priority', 16, 'created_at', 64, 'enqueued_at', 64, 'started_at', 64, 'ended_at', 64, 'attempts', 16,
  'unclean', 16, 'failed_reason', 1024, 'history', MAX_HISTORY, 'flow', 128, 'flow_step', 16, 'tags', 1024,
  'worker', 512, 'rows', 16, 'done', 16, 'skipped', 16, 'failed', 16, 'aborted', 16, 'source', 1024, 'name', 64,
  'instance', 64, 'params', 65536, 'goes_on_from', 128, 'code', 32, 'retry', 16, 'errors', 65536, 'create_at', 64,
  'update_at', 64,
}

local FED_NAMES, FED_SIZES = {}, {}
for i = 1, #FED, 2 do
  FED_NAMES[#FED_NAMES + 1], FED_SIZES[#FED_SIZES + 1] = FED[i], FED[i + 1]
end

-- They and their values in turn, of a hash that anybody may have written: one that Redis keeps in its compact form is small as a whole.
fed_of = function(key)
  local values, fields = try('OBJECT', 'ENCODING', key) == 'listpack' and redis.call('HMGET', key, unpack(FED_NAMES)), {}
  for i, name in ipairs(FED_NAMES) do
    local value = values and values[i]
    if not values and ((try('HSTRLEN', key, name) or 0) <= 65536) then value = try('HGET', key, name) end
    if value and value ~= '' then
      fields[#fields + 1] = name
      fields[#fields + 1] = string.sub(value, 1, FED_SIZES[i])
    end
  end
  return fields
end

-- `fields` is asked for fields and values in turn where somebody wants them.
feed = function(kind, id, fields)
  if not most_fed() then return end
  local number = try('HINCRBY', K.exporting(), 'number', 1)
  if number then
    try('XADD', K.export(), 'MAXLEN', '~', int(most_fed()), '*', 'number', int(number), 'kind', kind, 'id', id, unpack(fields()))
  end
end

-- A part of a batch is no record, and a flow is told with its steps.
feed_job = function(id)
  if not most_fed() then return end
  local _, batch = part_named(id)
  if is_flow(id) or (batch and is_batch(batch)) then return end
  local is_task = (try('HSTRLEN', K.job(id), 'kind') or 0) <= 16 and try('HGET', K.job(id), 'kind') == 'task'
  local kind = (is_batch(id) and 'batch') or (is_task and 'task') or 'sql'
  feed(kind, id, function() return fed_of(K.job(id)) end)
end

end

-- Enters the record of an ended job into the books: when it ended, when it expires, what it occupies, with so many bytes beside its
-- hash.
local function enter_books(id, ended_ms, retention_ms, more_bytes)
  redis.call('ZADD', K.finished(), int(ended_ms), id)
  redis.call('ZADD', K.expiring(), int(this.now_ms + retention_ms), id)
  -- A server may forbid the question: then records count by their number alone. Of a hash that somebody has made large it is an estimate.
  local samples = (try('HLEN', K.job(id)) or 0) <= 1000 and '0' or '5'
  local bytes = (try('MEMORY', 'USAGE', K.job(id), 'SAMPLES', samples) or 0) + (more_bytes or 0)
  if redis.call('HSETNX', K.kept(), id, bytes) == 0 then
    local before = tonumber(redis.call('HGET', K.kept(), id))
    redis.call('HSET', K.kept(), id, bytes)
    bytes = bytes - before
  end
  redis.call('HINCRBY', K.kept(), '*', bytes)
  feed_job(id)
end

-- A number that operators, or others, have written: nil where it is none within these bounds.
local function number_in(text, least, most)
  local number = tonumber(text)
  if number and number >= least and number <= most then return number end
  return nil
end

-- The job that holds a unique key, or nil. What holds it while it is queued, or until it is done, holds it no more once it is
-- gone, taken, or over, whatever the key says.
local function holder_of(key)
  local scope, id = string.match(try('GET', K.unique(key)) or '', '^(%a+) (.+)$')
  if not scope then return nil end
  if scope == 'period' then return id end
  local h = try('HMGET', K.job(id), 'status', 'fallback_status', 'unique')
  if not h or h[3] ~= key then return nil end
  -- One that runs has not ended, whatever others have written: somebody works on it.
  if redis.call('HEXISTS', K.claims(), id) == 1 then return scope ~= 'queued' and id or nil end
  return not is_over(h[1], h[2]) and id or nil
end

-- Takes a unique key for a job: false if another one holds it.
local function take_unique(key, scope, period_ms, id)
  local holder = holder_of(key)
  if holder and holder ~= id then return false end
  redis.call('SET', K.unique(key), scope .. ' ' .. id)
  if scope == 'period' then redis.call('PEXPIRE', K.unique(key), period_ms) end
  return true
end

-- Gives up the unique key that a job holds, if it holds one under one of these scopes.
local function give_up_unique(id, ...)
  local length = try('HSTRLEN', K.job(id), 'unique') or 0
  if length == 0 or length > MAX_UNIQUE then return end
  local key = try('HGET', K.job(id), 'unique')
  local held = try('GET', K.unique(key))
  for _, scope in ipairs({...}) do
    if held == scope .. ' ' .. id then redis.call('DEL', K.unique(key)) end
  end
end

-- What follows when a step of a flow has ended. flow.lua has it.
local step_over

-- Files a job that reached its final status. Its password has served its purpose; where it is known to be a task, it has none.
local function file(id, user, status, retention_ms, is_task, more_bytes)
  if not is_task then try('HDEL', K.job(id), 'pass') end
  give_up_unique(id, 'queued', 'done')
  redis.call('PEXPIRE', K.job(id), retention_ms)
  enter_books(id, this.now_ms, retention_ms, more_bytes)
  publish(user, id, status)
  -- The id of a step is made of two.
  if string.find(id, ':', 1, true) then step_over(id, user, status) end
end

-- Takes records out of the index of ended jobs and out of the books of what they occupy.
local function forget(ids)
  if #ids == 0 then return end
  local freed = 0
  for _, bytes in ipairs(redis.call('HMGET', K.kept(), unpack(ids))) do freed = freed + (tonumber(bytes) or 0) end
  redis.call('ZREM', K.finished(), unpack(ids))
  redis.call('ZREM', K.expiring(), unpack(ids))
  redis.call('HDEL', K.kept(), unpack(ids))
  redis.call('ZREM', K.batches(), unpack(ids))
  redis.call('ZREM', K.flows(), unpack(ids))
  if freed > 0 then redis.call('HINCRBY', K.kept(), '*', -freed) end
  if redis.call('HLEN', K.kept()) == 1 then redis.call('DEL', K.kept()) end
end

-- Takes a job off the schedule; where it was submitted with a delay, its line has one queued less.
local function unschedule(id)
  if redis.call('ZREM', K.due(), id) == 0 then return end
  local line = redis.call('HGET', K.delayed(), id)
  if not line then return end
  redis.call('HDEL', K.delayed(), id)
  if redis.call('HINCRBY', K.delays(), line, -1) <= 0 then redis.call('HDEL', K.delays(), line) end
end

-- Sets an id aside with its reason. The job's own hash is told too, but only where it is this user's: nobody can fail
-- another's job by queueing its id.
local function reject(id, user, reason, own_hash)
  set_aside(id, user, reason)
  if own_hash and record(id, user, 'status', 'failed', 'failed_reason', reason, 'ended_at', now()) then
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

-- Of a task's application and operation: the same rules as those of the identifiers in Rust.
local function pool_of_task(app, op)
  op = string.lower(op or '')
  if not app or #app > MAX_APP or not string.find(app, "^[%w!\"#$%%&'()+,/;<=>?@%[%]\\^_`{|}~-]+$") then
    return nil, 'its app is no valid name'
  end
  if #op > MAX_OP or not string.find(op, "^[%w!\"#$%%&'()+,./;<=>?@%[%]\\^_`{|}~-]+$") then
    return nil, 'its op is no valid name'
  end
  return app .. '.' .. op
end

-- Removes a part of a batch that is not to be done, or not any more.
local function drop_part(batch, id)
  redis.call('DEL', K.job(id))
  redis.call('HDEL', K.batch_parts(batch), id)
end

-- Removes a job's record, and what else there is of a batch or a flow.
local function remove_record(id)
  redis.call('UNLINK', K.job(id), K.batch(id), K.batch_rows(id), K.batch_blocks(id), K.batch_results(id), K.batch_parts(id), K.flow_steps(id))
end

-- Kinds of jobs that go to handlers where they name an application. Batches and their parts are SQL where they name none.
local FOR_HANDLERS = {task = true, batch = true, part = true}

-- Does what is to be done with one job, so that what fails there is no other's. What the work returns; else nil, and the id is set aside.
local function apart(id, user, work, ...)
  local sound, reply = pcall(work, ...)
  if sound then return reply end
  set_aside(id, user, fault_of(reply))
end

-- The names that are read of a job of each kind, how many of them a take hands out, where its part stands among them, and what an id in
-- a line is worth: the names that only these use are not kept, of which Lua has room for 200.
local NAMES, HANDED, PART_AT, look = {sql = {}, task = {}}, {}, {}, nil
do

-- What is read of a job to judge it, besides the fields of its kind.
local JUDGED = {'user', 'fence', 'kind', 'app', 'op', 'started_at'}
local LIMITS = {sql = {}, task = {}}
-- While a library is loaded there is no `pairs`.
local function name_fields_of(kind)
  local names, limits = NAMES[kind], LIMITS[kind]
  for i = 1, #FIELDS, 3 do
    if FIELDS[i + 2] == 'both' or FIELDS[i + 2] == kind then
      names[#names + 1] = FIELDS[i]
      limits[#names] = FIELDS[i + 1]
      if FIELDS[i] == 'part' then PART_AT[kind] = #names end
    end
  end
  HANDED[kind] = #names
  for i = 1, #JUDGED do names[#names + 1] = JUDGED[i] end
end
name_fields_of('sql')
name_fields_of('task')

-- The fields of a job of a kind, by their names and in their order, or the name, size and limit of one that is too long.
-- Values, where they are not given, are read only where the whole hash is small; else sizes are asked first.
local function read(job, kind, values)
  local names = NAMES[kind]
  if not values and redis.call('HLEN', job) <= 64 then
    local bytes = try('MEMORY', 'USAGE', job, 'SAMPLES', '0')
    values = bytes and bytes <= 65536 and redis.call('HMGET', job, unpack(names)) or nil
  end
  for i, name in ipairs(names) do
    local most = LIMITS[kind][i] or MAX_USER
    local size = values and #(values[i] or '') or redis.call('HSTRLEN', job, name)
    -- What is no fence counts as none.
    if size > most and name ~= 'fence' then return nil, name, size, most end
  end
  values = values or redis.call('HMGET', job, unpack(names))
  local h = {values = values}
  for i, name in ipairs(names) do h[name] = values[i] or nil end
  return h
end

-- The same of what our scripts make of their own, and of what pretends to be such: nothing where it is an ordinary job, or may run.
local function look_inside(id, user, h)
  local anothers = 'it belongs to another user than its queue'
  if h.kind == 'flow' then
    if is_flow(id) then return 'drop' end
    return 'reject', 'it is no flow that was launched as one', true
  end
  if h.kind == 'batch' then
    local b = redis.call('HMGET', K.batch(id), 'user', 'cursor')
    if not b[1] then return 'reject', 'it is no batch that was handed over as one', true end
    if b[1] ~= user then return 'reject', anothers end
    return not b[2] and 'drop' or nil
  end
  -- Nobody else's job may stand where a part of a batch or a step of a flow is to be.
  if string.find(id, ':', 1, true) then
    local what, batch = part_named(id)
    local owner = what and redis.call('HGET', K.batch(batch), 'user')
    if owner then
      if owner ~= user then return 'reject', anothers end
      h.kind = 'part'
      if part_of(id) then return nil end
      drop_part(batch, id)
      return 'drop'
    end
    owner = try('HGET', K.flow_steps(string.match(id, '^(.*):')), 'user')
    if owner and owner ~= user then return 'reject', anothers end
  end
  if h.kind == 'part' or (h.part and h.part ~= '') then
    return 'reject', 'it is no part of a batch that is known', true
  end
  if is_for_parts(id) then return 'reject', FOR_PARTS, true end
end

-- What an id in a line is worth: 'ready' with its pool and its fields, 'missing', 'drop' (claimed, or over with its status),
-- 'moves' with the line to which it belongs, or 'reject' with the reason and whether the hash is the user's own. Sizes are
-- asked before anything is read.
function look(id, line)
  this.looked = this.looked + 1
  local kind, user = parts_of(line)
  if not is_id(id) then return 'reject', 'its id is not made of letters, digits and _ . : -' end
  if redis.call('HEXISTS', K.claims(), id) == 1 then return 'drop' end
  local job = K.job(id)
  local encoding = try('OBJECT', 'ENCODING', job)
  if encoding == false then return 'missing' end
  local of = kind == 'sql' and 'sql' or 'task'
  -- So Redis keeps hashes of few and short fields, and short lists and sets.
  local values = encoding == 'listpack' and try('HMGET', job, unpack(NAMES[of])) or nil
  if not values and not try('HLEN', job) then
    return 'reject', 'its key holds a ' .. redis.call('TYPE', job).ok .. ', not a hash'
  end
  local h, field, size, most = read(job, of, values)
  if not h then
    local owner = redis.call('HSTRLEN', job, 'user') <= MAX_USER and redis.call('HGET', job, 'user')
    if field == 'user' then return 'reject', 'its field user is too long' end
    if owner and owner ~= '' and owner ~= user then return 'reject', 'it belongs to another user than its queue' end
    return 'reject', 'its field ' .. field .. ' is ' .. size .. ' bytes long, at most ' .. most .. ' are allowed', true
  end
  if h.user and h.user ~= '' and h.user ~= user then return 'reject', 'it belongs to another user than its queue' end
  if is_over(h.status, h.fallback_status) and not is_to_be_settled(h.status, h.trace) then return 'drop', h.status end
  local verdict, detail, is_own = look_inside(id, user, h)
  if verdict then return verdict, detail, is_own end
  if h.kind == 'task' or (FOR_HANDLERS[h.kind] and h.app) then
    local pool, fault = pool_of_task(h.app, h.op)
    if not pool then return 'reject', fault, true end
    if pool ~= kind then return 'moves', line_of(pool, user) end
    return 'ready', pool, h
  end
  if kind ~= 'sql' then return 'moves', 'sql:' .. user end
  if h.kind and h.kind ~= '' and h.kind ~= 'sql' and not FOR_HANDLERS[h.kind] then return 'reject', 'its kind is none that is known', true end
  if h.database and h.database ~= '' then return 'ready', 'db:' .. place_name(h.database), h end
  return 'ready', 'sql:' .. place_name(h.host or ''), h
end

end

-- A job's band: 'high', 'low' or ''.
local function band_of(id)
  local band = (try('HSTRLEN', K.job(id), 'priority') or 0) <= 8 and try('HGET', K.job(id), 'priority')
  return (band == 'high' or band == 'low') and band or ''
end

-- The list of a line in which its head stands, and whether it has others. While all bands have work, of 25 jobs that are taken 20 are of the high one,
-- 4 of the middle one and 1 is of the low one: so none waits for ever.
local function head_queue(line)
  local middle = queue_of(line)
  if redis.call('EXISTS', K.high(line), K.low(line)) == 0 then return middle, false end
  local turn = tonumber(redis.call('HGET', K.bands(), line) or 0) % 25
  local order = {K.high(line), middle, K.low(line)}
  if turn == 24 then
    order = {K.low(line), middle, K.high(line)}
  elseif turn % 5 == 4 then
    order = {middle, K.high(line), K.low(line)}
  end
  for _, queue in ipairs(order) do
    if redis.call('EXISTS', queue) == 1 then return queue, true end
  end
  return middle, true
end

-- Sends a line's head behind the others of its band: it has more to give.
local function pass_head(line, queue, has_bands)
  redis.call('RPOPLPUSH', queue, queue)
  if has_bands then redis.call('HINCRBY', K.bands(), line, 1) end
end

-- Takes a line's head out, for good; whether more waits behind it.
local function pop_head(line, queue, has_bands)
  redis.call('RPOP', queue)
  if not has_bands then return redis.call('EXISTS', queue) == 1 end
  redis.call('HINCRBY', K.bands(), line, 1)
  return redis.call('EXISTS', queue_of(line), K.high(line), K.low(line)) > 0
end

-- The first of all FIELDS, of whatever kind.
local STATUS_AT = 1

-- Pushes an id that stood in another line to its own.
local function move(id, line)
  if try('LPUSH', queue_of(line, band_of(id)), id) then
    index(line)
    this.moves[#this.moves + 1] = line
  else
    local _, user = parts_of(line)
    set_aside(id, user, 'the key of its queue holds no list')
  end
end

-- The id at a line's head, its pool, its fields, its list and whether the line has others, after removing what can't run. Nil if
-- nothing is left.
local function head(line)
  local kind, user = parts_of(line)
  for _ = 1, 100 do
    local queue, has_bands = head_queue(line)
    local id = redis.pcall('LINDEX', queue, -1)
    if type(id) == 'table' then
      unindex(line)
      reject('-', user, 'its queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list')
      return nil
    end
    if not id then
      unindex(line)
      return nil
    end
    local verdict, detail, more = look(id, line)
    if verdict == 'ready' then return id, detail, more, queue, has_bands end
    redis.call('RPOP', queue)
    if verdict == 'reject' then
      reject(id, user, detail, more)
    elseif verdict == 'moves' then
      move(id, detail)
    elseif verdict == 'drop' and detail and redis.call('PTTL', K.job(id)) == -1 then
      -- Somebody else ended it, and left it without a lifetime.
      file(id, user, detail, MAX_REJECTED_MS)
    elseif verdict == 'missing' then
      -- Fractions of a ms keep ids that are looked at together in their order.
      this.missed = this.missed + 1
      redis.call('ZADD', K.missing(), 'NX', string.format('%.3f', this.now_ms + MISSING_MS + this.missed / 1000), id .. ' ' .. user)
    end
  end
  -- A hundred unfit ids: the leader's next scan goes on.
  if redis.call('EXISTS', queue_of(line), K.high(line), K.low(line)) == 0 then unindex(line) end
  return nil
end

-- Enters a pool into those that may have something to take. Start-time fair queueing over pools: it starts where the turns
-- are, or where its own last turn has left it.
local function list_pool(pool)
  local class = class_of(pool)
  local listed = K.pools(class)
  if redis.call('ZSCORE', listed, pool) then return end
  local pass = tonumber(redis.call('HGET', K.pool(pool), 'pass') or 0) or 0
  redis.call('ZADD', listed, int(math.max(pass, this.moved_on.turn, tonumber(redis.call('GET', K.turn()) or 0) or 0)), pool)
  if redis.call('ZCARD', listed) == 1 then redis.call('SADD', K.classes(), class) end
end

-- Most jobs of one user that may run at once in a pool.
local function user_limit_of(pool, said) return number_in(said, 0, MAX_COUNT) or (is_sql(pool) and 1 or math.huge) end

-- Enters a user into a pool's ready-set unless it is there, at its limit, or kept from its turn. Start-time fair queueing: a
-- user who owes nothing starts at the pool's virtual time, each newcomer one unit behind the one before, so that ties go to
-- who waited longest.
local function ready(pool, user)
  if redis.call('SISMEMBER', K.barred(user), line_of(pool, user)) == 1 then return false end
  local p = redis.call('HMGET', K.pool(pool), 'v', 'newest', 'user_limit')
  if tonumber(redis.call('HGET', K.busy(pool), user) or 0) >= user_limit_of(pool, p[3]) then return false end
  if redis.call('ZSCORE', K.ready(pool), user) then
    -- Scans make it right, should the pool have left the list.
    list_pool(pool)
    return false
  end
  local v = this.moved_on.v[pool] or tonumber(p[1] or 0)
  local start = tonumber(redis.call('ZSCORE', K.debt(pool), user) or 0)
  if start <= v then
    start = math.max(v, tonumber(p[2] or -1) + 1)
    redis.call('HSET', K.pool(pool), 'newest', int(start))
  end
  redis.call('ZADD', K.ready(pool), int(start), user)
  list_pool(pool)
  return true
end

-- Puts a line's user where its head says. Returns the pool, and whether the user is new there. A line of tasks has one pool, so its
-- head is not looked at before its turn comes.
local function place(line)
  local kind, user = parts_of(line)
  if kind ~= 'sql' then
    if redis.call('ZSCORE', K.ready(kind), user) then return kind, false end
    if redis.call('EXISTS', queue_of(line), K.high(line), K.low(line)) == 0 then
      unindex(line)
      return nil
    end
    return kind, ready(kind, user)
  end
  local id, pool = head(line)
  -- What moved to other lines has its place there.
  while #this.moves > 0 do
    local moved_kind, moved_user = parts_of(table.remove(this.moves))
    if moved_kind ~= 'sql' and ready(moved_kind, moved_user) then wake_one(moved_kind) end
  end
  if not id then return nil end
  return pool, ready(pool, user)
end

-- The same for a line whose user may have become ready where nobody looks. Whether it has.
local function place_and_wake(line)
  local pool, new = place(line)
  if new then wake_one(pool) end
  return new
end

-- Gives lines of a user that were kept from their turn another one, `most` of them: the take sees whether the user's limits allow
-- it. Returns the pools in which the user is ready now and was not.
local function lift(user, most)
  local pools = {}
  for _, line in ipairs(redis.call('SPOP', K.barred(user), most)) do
    local pool, new = place(line)
    if new then pools[#pools + 1] = pool end
  end
  return pools
end

local function weight_in(text) return number_in(text, MIN_WEIGHT, MAX_WEIGHT) or 1 end
local function weight_of(user) return weight_in(try('HGET', K.limits(user), 'weight')) end

-- What limits a user or a pool, as the hash of either has it. What is no number within its bounds counts for nothing.
local LIMITS_OF_BOTH = {'weight', 'concurrency', 'rate', 'period', 'paused'}
local function limits_in(weight, concurrency, rate, period, paused)
  period = number_in(period, 1, MAX_PERIOD_MS)
  rate = period and number_in(rate, 1, MAX_RATE)
  return {weight = weight_in(weight), concurrency = number_in(concurrency, 0, MAX_COUNT), rate = rate and math.floor(rate),
    period = rate and math.floor(period), paused = paused and paused ~= '' and paused ~= '0'}
end

local function limits_of(user)
  local h = try('HMGET', K.limits(user), 'timeout', unpack(LIMITS_OF_BOTH)) or {}
  local own = limits_in(unpack(h, 2, 6))
  own.timeout = number_in(h[1], 1, MAX_PERIOD_MS)
  return own
end

-- A pool's limits, where it stands among them, and whether somebody else schedules it. An operator's concurrency comes before a
-- configuration's capacity; where nobody says anything, the slots of the workers are the limit of a handler.
local function limits_of_pool(pool, default_capacity)
  local p = redis.call('HMGET', K.pool(pool), 'running', 'v', 'blocked', 'capacity', 'user_limit', unpack(LIMITS_OF_BOTH))
  local own = limits_in(unpack(p, 6, 10))
  own.per_user = user_limit_of(pool, p[5])
  own.running, own.v, own.blocked = tonumber(p[1] or 0), tonumber(p[2] or 0), p[3]
  own.concurrency = own.concurrency or number_in(p[4], 0, MAX_COUNT) or (is_sql(pool) and default_capacity or nil)
  return own
end

-- What keeps `user:<user>` or `pool:<pool>` from its turn: 'paused', 'concurrency', or 'rate' and until when, in ms since 1970.
-- Of a rate the last starts are kept, as many as it allows: so in no period of its length, whenever it begins, there are
-- more. One in the future is from before the clock was set back.
local function kept_by(whose, own, running)
  if own.paused then return 'paused' end
  if own.concurrency and running >= own.concurrency then return 'concurrency' end
  local first = own.rate and tonumber(redis.call('LINDEX', K.starts(whose), own.rate - 1))
  if first and first <= this.now_ms and first + own.period > this.now_ms then return 'rate', first + own.period end
  return nil
end

local function user_kept_by(user, own)
  local running = own.concurrency and tonumber(redis.call('HGET', K.active(), user) or 0)
  return kept_by('user:' .. user, own, running)
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

-- Gives pools the places back that ended claims held, and users what their limits allow again.
local function make_room(pools, users)
  for pool, count in pairs(pools) do
    if redis.call('HINCRBY', K.pool(pool), 'running', -count) < 0 then redis.call('HSET', K.pool(pool), 'running', 0) end
    if redis.call('EXISTS', K.ready(pool)) == 1 then list_pool(pool) end
  end
  for user in pairs(users) do
    for _, pool in ipairs(lift(user, 100)) do
      if not pools[pool] then wake_one(pool) end
    end
  end
end

-- Ends a claim: all that the take did, undone. What becomes of the job is the caller's to write. `pools` and `users`, where they are
-- given, gather what many ends have in common: the caller then makes room for all of them at once.
local function release(id, claim, pools, users)
  redis.call('HDEL', K.claims(), id)
  redis.call('HDEL', K.work(claim.session), id)
  local session = claim.session
  if this.suspects[session] == nil then
    this.suspects[session] = redis.call('HGET', K.session(session), 'suspect')
    this.cancelling[session] = redis.call('EXISTS', K.cancels(session)) == 1
  end
  if this.cancelling[session] then redis.call('SREM', K.cancels(session), id) end
  if this.suspects[session] == id then
    redis.call('HDEL', K.session(session), 'suspect')
    this.suspects[session] = false
  end
  if redis.call('HINCRBY', K.busy(claim.pool), claim.user, -1) <= 0 then
    redis.call('HDEL', K.busy(claim.pool), claim.user)
  end
  if redis.call('HINCRBY', K.active(), claim.user, -1) <= 0 then redis.call('HDEL', K.active(), claim.user) end
  if is_sql(claim.pool) then
    take_out(K.wip(claim.user), id)
    if redis.call('EXISTS', K.wip(claim.user)) == 0 then try('SREM', K.wip_users(), claim.user) end
  end
  if not pools then return make_room({[claim.pool] = 1}, {[claim.user] = true}) end
  pools[claim.pool] = (pools[claim.pool] or 0) + 1
  users[claim.user] = true
end

-- Puts a job at the front of its line.
local function put_first(id, line)
  local queue = queue_of(line, band_of(id))
  if try('RPUSH', queue, id) then
    index(line)
    return true
  end
  local _, user = parts_of(line)
  local reason = 'its queue holds a ' .. redis.call('TYPE', queue).ok .. ', not a list'
  -- A part of a batch waits until that is mended, for a batch without it would never end.
  if part_of(id) then set_aside(id, user, reason) else reject(id, user, reason, true) end
  return false
end

-- The line to which a job's hash says that it belongs, for a user.
local function line_by_hash(id, user)
  for _, name in ipairs({'kind', 'app', 'op'}) do
    if (try('HSTRLEN', K.job(id), name) or 0) > MAX_USER then return 'sql:' .. user end
  end
  local h = try('HMGET', K.job(id), 'kind', 'app', 'op')
  local pool = h and (h[1] == 'task' or (FOR_HANDLERS[h[1]] and h[2])) and pool_of_task(h[2], h[3])
  return pool and line_of(pool, user) or 'sql:' .. user
end

-- Enters a line's user where its head says. Where that is not `pool`, somebody who serves it may be parked.
local function place_on(line, pool)
  local at, new = place(line)
  if new and at ~= pool then wake_one(at) end
end

-- Cancels a job that waits, with these fields more.
local function withdraw(id, user, retention_ms, ...)
  local line = line_by_hash(id, user)
  local queue = queue_of(line, band_of(id))
  -- A long queue is not searched: take drops what is final.
  if (try('LLEN', queue) or 0) <= 1000 then try('LREM', queue, 0, id) end
  unschedule(id)
  record(id, user, 'status', 'cancelled', 'ended_at', now(), 'cancel_requested_at', now(), ...)
  file(id, user, redis.call('HGET', K.job(id), 'status'), retention_ms)
  -- Another job is the user's head now, perhaps of another pool. A line that is empty is nobody's to find, should nobody serve it.
  local kind = parts_of(line)
  if kind ~= 'sql' and redis.call('EXISTS', queue_of(line), K.high(line), K.low(line)) == 0 then
    redis.call('ZREM', K.ready(kind), user)
    unindex(line)
  elseif is_user(user) then
    place_and_wake(line)
  end
end

-- Asks whoever runs a job to cancel it.
local function ask_to_cancel(id, claim)
  redis.call('SADD', K.cancels(claim.session), id)
  tell(K.cancel(claim.session), id)
end

-- Has whoever takes a waiting job next find out what a lost worker has done of it, before it is cancelled, and soon.
local function cancel_when_settled(id)
  redis.call('HSETNX', K.job(id), 'cancel_requested_at', now())
  redis.call('ZADD', K.due(), 'XX', int(this.now_ms), id)
end

-- Puts a job whose claim is gone at the front of its queue as if it had not been taken, with `extra` fields and values.
local function put_back(id, claim, extra)
  local status = try('HGET', K.job(id), 'status')
  local fields = {unpack(extra)}
  if try('HGET', K.job(id), 'fallback_status') == 'running' then
    append(fields, 'fallback_status', 'pending')
  end
  if not FINAL[status] then
    append(fields, 'status', 'pending')
  end
  local line = line_of(claim.pool, claim.user)
  if record(id, claim.user, 'user', claim.user, unpack(fields)) and put_first(id, line) then
    publish(claim.user, id, 'pending')
  end
  place_on(line, claim.pool)
end

-- How often a job's worker was lost while it ran. What is not written as a count is none.
local function unclean_in(text) return text and #text <= 16 and string.find(text, '^%d+$') and tonumber(text) or 0 end
local function unclean_of(id)
  return redis.call('HSTRLEN', K.job(id), 'unclean') <= 16 and unclean_in(redis.call('HGET', K.job(id), 'unclean')) or 0
end

-- The history in a hash with one more entry, the oldest dropped.
local function history_with(key, entry)
  local text = try('HSTRLEN', key, 'history') or 0
  text = text <= MAX_HISTORY and try('HGET', key, 'history') or ''
  text = text .. (text == '' and '' or '\n') .. cjson.encode(entry)
  while #text > MAX_HISTORY do text = string.sub(text, (string.find(text, '\n', 1, true) or #text) + 1) end
  return text
end

-- Ends a part of a batch that ended its workers before they could look at it, and says whether it did. Who has anything to do with
-- parts has its text.
local lost_part

-- Whether somebody has cancelled a claimed job by writing its hash, the only way that foreign cancellers know. Nobody writes
-- `cancelled` under a claim of ours before it ends.
local function cancelled_by_hash(id) return try('HGET', K.job(id), 'status') == 'cancelled' end

-- A worker was lost while it ran the job. Anybody may write into its hash how many were: our own word is one more key.
local function note_lost(id) redis.call('SET', K.lost(id), now(), 'PX', 86400000) end

-- A job whose worker is gone, and so its claim: an unclean end. It goes back to the front of its queue, for whoever takes it next to
-- settle what was begun; but for one that ends its workers before they can even look at it.
local function lose(id, claim)
  if redis.call('TYPE', K.job(id)).ok ~= 'hash' then return put_back(id, claim, {}) end
  local unclean = unclean_of(id) + 1
  note_lost(id)
  local fields = {'unclean', int(unclean), 'lost_worker', claim.session, 'history', history_with(K.job(id),
    {unclean = true, worker = claim.session, ended_at = now(), error = 'its worker was lost'})}
  if unclean < MAX_UNCLEAN then return put_back(id, claim, fields) end
  local reason = 'it ended ' .. int(unclean) .. ' workers, the last one ' .. claim.session
  if part_of(id) and lost_part(id, claim.user, reason) then
    return place_on(line_of(claim.pool, claim.user), claim.pool)
  end
  local begun = (try('HGET', K.job(id), 'trace') or '') ~= ''
  local status = (cancelled_by_hash(id) and 'cancelled') or (begun and 'unknown') or 'ignored'
  if record(id, claim.user, 'user', claim.user, 'status', status, 'ended_at', now(), 'failed_reason', reason, unpack(fields)) then
    if try('HGET', K.job(id), 'fallback_status') then record(id, claim.user, 'fallback_status', 'skipped') end
    file(id, claim.user, status, MAX_REJECTED_MS)
  end
  place_on(line_of(claim.pool, claim.user), claim.pool)
end

-- Refuses what is not, or no longer, the leader's to do.
local function leads(session, term) return redis.call('GET', K.leader()) == session .. '\t' .. term end

-- A scheduled job is due: it joins the front of its line, for it has waited longest.
local function promote(id)
  if redis.call('HEXISTS', K.claims(), id) == 1 then return end
  local held = redis.call('TYPE', K.job(id)).ok
  if held ~= 'hash' then
    set_aside(id, '', 'it was due, but its key holds ' .. (held == 'none' and 'nothing' or 'a ' .. held))
    return
  end
  local h = redis.call('HMGET', K.job(id), 'user', 'status', 'fallback_status')
  local to_be_settled = h[2] == 'cancelled' and is_to_be_settled(h[2], try('HGET', K.job(id), 'trace'))
  if h[2] ~= 'scheduled' and not to_be_settled then
    -- Somebody else ended it, and left it without a lifetime.
    if is_over(h[2], h[3]) and redis.call('PTTL', K.job(id)) == -1 then file(id, h[1] or '', h[2], MAX_REJECTED_MS) end
    return
  end
  if not h[1] or not is_user(h[1]) then
    reject(id, h[1] or '', 'it was due, but its hash names no valid user', true)
    return
  end
  local line = line_by_hash(id, h[1])
  local status = to_be_settled and 'cancelled' or 'pending'
  if record(id, h[1], 'status', status) and put_first(id, line) then
    publish(h[1], id, status)
    place_and_wake(line)
  end
end

-- Promotes what is due. Of many the one due first goes last, so that it ends up foremost.
local function promote_due(most)
  local ids = redis.call('ZRANGEBYSCORE', K.due(), '-inf', this.now_ms, 'LIMIT', 0, most)
  for i = #ids, 1, -1 do
    unschedule(ids[i])
    apart(ids[i], '', promote, ids[i])
  end
  return #ids
end
