-- Changes what limits a user or a pool, or pauses and resumes one of them or everything; what was kept from its turn is looked
-- at anew at once.
-- ARGV: 'user', 'pool' or 'all'; its name ('' for all); then field and value in turn, '' for none. Of `paused` the value is
--   '=' and the reason; since when it holds stays, should it be said again. For all there is no other field
-- Reply: 'changed', or {'refused', reason}
local kind, name = ARGV[1], ARGV[2]

local function wake_ready(pool)
  if redis.call('EXISTS', K.ready(pool)) == 1 then
    list_pool(pool)
    wake_one(pool)
  end
end

local function pause_text(before, said)
  return (string.match(before or '', '^%d%d%d%d%-%d%d%-%d%dT%S+Z') or now()) .. ' ' .. string.sub(said, 2)
end

if kind == 'all' then
  if ARGV[4] ~= '' then
    redis.call('SET', K.paused(), pause_text(try('GET', K.paused()), ARGV[4]))
  else
    redis.call('DEL', K.paused())
    for _, class in ipairs(redis.call('SMEMBERS', K.classes())) do
      for _, pool in ipairs(redis.call('ZRANGE', K.pools(class), 0, 999)) do wake_ready(pool) end
    end
  end
  return 'changed'
end

local key = kind == 'user' and K.limits(name) or K.pool(name)
local held = redis.call('TYPE', key).ok
if held ~= 'hash' and held ~= 'none' then return {'refused', 'its key ' .. key .. ' holds a ' .. held .. ', not a hash'} end
for i = 3, #ARGV, 2 do
  local field, value = ARGV[i], ARGV[i + 1]
  if value == '' then
    redis.call('HDEL', key, field)
  else
    if field == 'paused' then value = pause_text(redis.call('HGET', key, field), value) end
    redis.call('HSET', key, field, value)
  end
end

local whose = kind .. ':' .. name
redis.call('ZREM', K.throttled(), whose)
-- Of a longer period the starts that are known count.
local own = kind == 'user' and limits_of(name) or limits_of_pool(name)
if own.rate then redis.call('PEXPIRE', K.starts(whose), int(own.period)) end

if kind == 'user' then
  for _, pool in ipairs(lift(name, 10000)) do wake_one(pool) end
  return 'changed'
end
-- Users who run as many as they may are not ready, and all others are.
local most = user_limit_of(name, redis.call('HGET', key, 'user_limit'))
local busy = redis.call('HGETALL', K.busy(name))
for i = 1, #busy, 2 do
  if tonumber(busy[i + 1]) >= most then
    redis.call('ZREM', K.ready(name), busy[i])
  else
    place_and_wake(line_of(name, busy[i]))
  end
end
-- A turn that a lower weight has put off comes as soon as after a job of the present one.
local latest = (tonumber(redis.call('GET', K.turn()) or 0) or 0) + math.floor(1000000 / own.weight)
if (tonumber(redis.call('HGET', key, 'pass') or 0) or 0) > latest then
  redis.call('HSET', key, 'pass', int(latest))
  redis.call('ZADD', K.pools(class_of(name)), 'XX', int(latest), name)
end
wake_ready(name)
return 'changed'
