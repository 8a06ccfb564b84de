-- Pauses a schedule, or lets it go on. Its next tick stays the same: what becomes due meanwhile is missed, and treated as such.
-- ARGV: name, 'pause' or 'resume'
-- Reply: 'changed', 'same' (it stood so), or 'missing'
local name, wish = ARGV[1], ARGV[2]
local key = K.schedule(name)
if redis.call('TYPE', key).ok ~= 'hash' then return 'missing' end
local paused, due = redis.call('HEXISTS', key, 'paused') == 1, redis.call('HGET', key, 'due')
if paused == (wish == 'pause') then return 'same' end
if wish == 'pause' then
  redis.call('HSET', key, 'paused', now())
  redis.call('ZADD', K.schedules(), '+inf', name)
else
  redis.call('HDEL', key, 'paused')
  redis.call('ZADD', K.schedules(), string.find(due or '', '^%d+$') and due or '+inf', name)
end
return 'changed'
