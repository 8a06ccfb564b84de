-- Launches an execution of an instance of a flow: the first, or one that goes on where the last one failed or was stopped.
-- ARGV: instance, id of the execution, user, 'force' (all steps run, whatever is done) or '', 1 if an instance that is done may be
--   launched again or 0, number of fields and values, fields and values in turn, plan, packed, then the fields of each step's job, packed
-- Reply: {'launched', id of the execution that it goes on from or ''}, {'exists', status} (it was launched before: nothing was written),
--   {'running', id}, {'done', id}, {'abandoned', id} (the instance's last execution is so, and forbids another), {'refused', reason}, or
--   {'no_room', bytes of memory used, bytes above which nothing new is accepted}
local instance, flow, user, is_forced, may_repeat = K.flow_instance(ARGV[1]), ARGV[2], ARGV[3], ARGV[4] == 'force', ARGV[5] == '1'
local m = tonumber(ARGV[6])
local fields, packed = {unpack(ARGV, 7, 6 + m)}, ARGV[7 + m]
local job, key = K.job(flow), K.flow_steps(flow)
local used, mark = string.match(redis.call('GET', K.full()) or '', '^(%d+) (%d+)$')
local there = redis.call('TYPE', job).ok
if there == 'hash' and is_flow(flow) and redis.call('HGET', key, 'instance') == ARGV[1] then
  return {'exists', redis.call('HGET', job, 'status') or ''}
end
if there ~= 'none' then return {'refused', 'a job of another kind, or of another flow, has this id'} end
if is_for_parts(flow) then return {'refused', FOR_PARTS} end
if used then return {'no_room', used, mark} end

-- The latest execution; where a launch broke off before it had made one, the one before.
local function execution_of(name)
  local id = redis.call('HGET', instance, name)
  local l = id and id ~= flow and is_flow(id) and try('HMGET', K.job(id), 'status', 'abandoned_at')
  if l and l[1] then return id, l end
end
local last, l = execution_of('last')
if not last then last, l = execution_of('before') end
if last and l[1] == 'running' then return {'running', last} end
if last and not is_forced then
  if l[2] then return {'abandoned', last} end
  if l[1] == 'done' and not may_repeat then return {'done', last} end
end
local goes_on = last and not is_forced and l[1] ~= 'done'

-- No step takes the place of a job that was submitted, or that runs. A hash that others have only written is none.
local plan = cmsgpack.unpack(packed)
for _, step in ipairs(plan) do
  local id = flow .. ':' .. step[1]
  local is_there = try('HEXISTS', K.job(id), 'enqueued_at') == 1 and redis.call('HGET', K.job(id), 'flow') ~= flow
  if is_there or redis.call('HEXISTS', K.claims(), id) == 1 then
    return {'refused', 'there is a job ' .. id .. ', which its step ' .. step[1] .. ' would be'}
  end
end

-- Whatever is left of one whose record somebody has removed.
redis.call('DEL', key)

-- What is done stays so, by the names of the steps; but what follows failures, or any end, follows those of this execution.
local done, kept, left = {}, {}, {}
local before = goes_on and redis.call('HGET', K.flow_steps(last), 'plan')
for number, step in ipairs(before and cmsgpack.unpack(before) or {}) do
  local entry = redis.call('HGET', K.flow_steps(last), number)
  local facts = facts_of(entry)
  left[step[1]] = {checkpoint = facts.checkpoint, checkpoint_of = facts.checkpoint_of, earlier = facts.earlier}
  if state_of(entry) == 'done' then
    facts.from = facts.from or last
    done[step[1]] = facts
  end
end
redis.call('HSET', key, 'plan', packed, 'user', user, 'instance', ARGV[1])
for f = 1, m, 2 do
  if fields[f] == 'keep' then redis.call('HSET', key, 'keep', fields[f + 1]) end
end
for number, step in ipairs(plan) do
  local facts = done[step[1]]
  kept[number] = facts ~= nil
  for _, before in ipairs(step[3] ~= 'done' and step[2] or {}) do kept[number] = kept[number] and kept[before] end
  if kept[number] then
    set_step(key, number, 'done', facts)
  else
    local facts, fields = left[step[1]] or {}, ARGV[7 + m + number]
    if facts.checkpoint or facts.earlier then
      local flat = cmsgpack.unpack(fields)
      for name, value in pairs(facts) do flat[#flat + 1], flat[#flat + 2] = name, value end
      fields = cmsgpack.pack(flat)
    end
    redis.call('HSET', key, 'job:' .. number, fields)
    set_step(key, number, 'waiting', facts)
  end
end
-- The record comes last: a launch that broke off before is made anew, and behind it all is there that goes on.
redis.call('PERSIST', instance)
local launches = tonumber(redis.call('HGET', instance, 'launches') or 0) or 0
redis.call('HSET', instance, 'last', flow, 'before', last or '', 'launches', int(launches + 1))
redis.call('ZADD', K.flows(), int(this.now_ms), flow)
redis.call('HSET', job, 'user', user, 'kind', 'flow', 'status', 'running', 'created_at', now(), 'started_at', now(), 'updated_at', now(),
  'instance', ARGV[1], unpack(fields))
if goes_on then redis.call('HSET', job, 'goes_on_from', last) end
redis.call('HDEL', instance, 'before')
publish(user, flow, 'running')
advance(flow)
return {'launched', goes_on and last or ''}
