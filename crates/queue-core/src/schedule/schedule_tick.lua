-- Moves a schedule on from the tick that is due: counts what is missed, and submits the job of the tick that is made. All in one
-- step: so a tick is made once, whoever makes it, wherever it breaks off, and however long the record of its job is kept.
-- enqueue.lua stands before this as the function enqueue.
-- ARGV: leader's session, term, name, revision and due tick as the caller read them, the tick that follows ('' for none), how many
--   are missed, the latest of these, why it is missed, what the tick that follows waits for ('' for nothing but its time), the tick that
--   is made and the id of its job ('' each for none), then the arguments of enqueue.lua for this job
-- Reply: 'not_leader', 'changed' (the schedule is not as it was read: nothing was written), 'passed' (where no tick is made), or what
--   enqueue says of the job; where that is neither 'queued' nor 'exists', nothing was written
local session, term, name, revision, due, following = unpack(ARGV, 1, 6)
local missed, last_missed, because, waiting, tick, id = unpack(ARGV, 7, 12)
local key, reply = K.schedule(name), 'passed'
if not leads(session, term) then return 'not_leader' end
local h = try('HMGET', key, 'revision', 'due', 'paused', 'misses')
if not h or (h[1] or '') ~= revision or (h[2] or '') ~= due or h[3] then return 'changed' end
-- The server's clock was set back since the caller asked for it.
if tick ~= '' and tonumber(tick) > this.now_ms then return 'changed' end

if id ~= '' then
  reply = submit({unpack(ARGV, 13)})[1]
  if reply ~= 'queued' and reply ~= 'exists' then return reply end
end
-- In one command, so that nothing is counted twice where this broke off.
local fields = {'due', following}
if id ~= '' then append(fields, 'last_tick', tick, 'last_job', id) end
if waiting ~= '' then append(fields, 'waiting', waiting) end
if tonumber(missed) > 0 then
  append(fields, 'misses', int((tonumber(h[4]) or 0) + missed), 'last_missed', last_missed, 'missed_because', because)
end
redis.call('HSET', key, unpack(fields))
if waiting == '' then redis.call('HDEL', key, 'waiting') end
redis.call('ZADD', K.schedules(), tonumber(following) and following or '+inf', name)
return reply
