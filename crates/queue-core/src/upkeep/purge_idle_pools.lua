-- Forgets pools that have had nothing running and nobody ready for long, and with them what their users owed. Pools with
-- a capacity or limit of their own stay.
-- ARGV: leader's session, term, for how many ms a pool must have been idle, pools
-- Reply: the number forgotten, or 'not_leader'
local session, term, idle_ms = ARGV[1], ARGV[2], tonumber(ARGV[3])
if not leads(session, term) then return 'not_leader' end
local forgotten = 0
for i = 4, #ARGV do
  local pool = ARGV[i]
  local p = redis.call('HMGET', K.pool(pool), 'running', 'capacity', 'user_limit', 'idle_since', 'concurrency', 'rate', 'weight',
    'paused')
  if tonumber(p[1] or 0) > 0 or redis.call('EXISTS', K.ready(pool)) == 1 then
    if p[4] then redis.call('HDEL', K.pool(pool), 'idle_since') end
  elseif not p[4] then
    redis.call('HSET', K.pool(pool), 'idle_since', int(this.now_ms))
  elseif not p[2] and not p[3] and not p[5] and not p[6] and not p[7] and not p[8] and this.now_ms - tonumber(p[4]) >= idle_ms then
    redis.call('DEL', K.pool(pool), K.debt(pool), K.busy(pool), K.pace(pool))
    redis.call('ZREM', K.pools(class_of(pool)), pool)
    forgotten = forgotten + 1
  end
end
for _, class in ipairs(redis.call('SMEMBERS', K.classes())) do
  if redis.call('EXISTS', K.pools(class)) == 0 then redis.call('SREM', K.classes(), class) end
end
return forgotten
