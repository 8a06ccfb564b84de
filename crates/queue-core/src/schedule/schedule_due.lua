-- Finds the schedules whose next tick is due, the one due first first.
-- ARGV: leader's session, term, how many of them to leave out, most of them
-- Reply: {now in ms, when the next tick is due in ms or '', names…}, or 'not_leader'
local session, term, left_out, most = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
if not leads(session, term) then return 'not_leader' end
-- Where others have made something else of the key there is none.
local coming = try('ZRANGEBYSCORE', K.schedules(), '(' .. int(this.now_ms), '(+inf', 'WITHSCORES', 'LIMIT', 0, 1) or {}
local reply = {int(this.now_ms), coming[2] or ''}
for _, name in ipairs(try('ZRANGEBYSCORE', K.schedules(), '-inf', int(this.now_ms), 'LIMIT', left_out, most) or {}) do
  if redis.call('EXISTS', K.schedule(name)) == 1 then
    reply[#reply + 1] = name
  else
    redis.call('ZREM', K.schedules(), name)
  end
end
return reply
