-- Reads the steps of an execution of a flow.
-- ARGV: id
-- Reply: nil if there is none, or for each step {name, numbers of those that it comes after separated by blanks, on which end, state,
--   facts as JSON, status, claimed (1 or 0), started_at, history, progress and checkpoint of its job while that is queued, each '' for none}
local flow, key = ARGV[1], K.flow_steps(ARGV[1])
local packed = try('HGET', key, 'plan')
if not packed then return nil end
local steps = {}
for number, step in ipairs(cmsgpack.unpack(packed)) do
  local entry = redis.call('HGET', key, number) or ''
  local live = {'', 0, '', '', '', ''}
  if state_of(entry) == 'queued' then
    local id = at_work(flow, step)
    for place, name in pairs({[1] = 'status', [3] = 'started_at', [4] = 'history', [5] = 'progress', [6] = 'checkpoint'}) do
      if (try('HSTRLEN', K.job(id), name) or 0) <= MAX_CHECKPOINT then live[place] = try('HGET', K.job(id), name) or '' end
    end
    live[2] = redis.call('HEXISTS', K.claims(), id)
    if id == rows_of_step(flow, step) then
      -- Rows are dealt: what is at work shows in the batch.
      local b = redis.call('HMGET', K.batch(id), 'done', 'failed', 'rows')
      live[2] = try('HGET', K.job(id), 'status') == 'running' and 1 or 0
      live[5] = cjson.encode({done = tonumber(b[1]) + tonumber(b[2]), total = tonumber(b[3])})
    end
  end
  steps[number] = {step[1], table.concat(step[2], ' '), step[3], state_of(entry) or '', string.match(entry, ' (.*)$') or '{}', unpack(live)}
end
return steps
