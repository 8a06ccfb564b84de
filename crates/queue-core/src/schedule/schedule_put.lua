-- Creates a schedule, or defines one anew.
-- ARGV: name, a revision that no other definition has, its first tick in ms, number of fields and values, fields and values of
--   the definition in turn
-- Reply: 'created', 'replaced', 'same' (it is defined so: nothing was changed), or {'refused', reason}
local name, revision, due, m = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local key, fields = K.schedule(name), {unpack(ARGV, 5, 4 + m)}
-- What is no part of the definition.
local keeps = {revision = true, due = true, paused = true, created_at = true, last_tick = true, last_job = true, misses = true,
  last_missed = true, missed_because = true, waiting = true}

local held = redis.call('TYPE', key).ok
if held ~= 'none' and held ~= 'hash' then return {'refused', 'its key holds a ' .. held .. ', not a hash'} end
if not try('ZCARD', K.schedules()) then return {'refused', 'the key of the schedules holds no sorted set'} end
if redis.call('HLEN', key) > 1000 then return {'refused', 'its key holds more fields than any schedule'} end

local given, changed = {}, {}
for i = 1, m, 2 do
  given[fields[i]] = true
  if redis.call('HSTRLEN', key, fields[i]) ~= #fields[i + 1] or redis.call('HGET', key, fields[i]) ~= fields[i + 1] then
    changed[fields[i]] = true
  end
end
local gone = {}
for _, field in ipairs(redis.call('HKEYS', key)) do
  if not given[field] and not keeps[field] then gone[#gone + 1] = field end
end
local stands = redis.call('HGET', key, 'due')
local stays = stands and string.find(stands, '^%d+$') and not changed.cron and not changed.zone
-- The next tick is an earlier one: the server's clock was ahead for a while. But a first tick that is over by now may have been
-- made since the caller asked for the time.
if stays and tonumber(stands) > tonumber(due) and tonumber(due) > this.now_ms and redis.call('HGET', key, 'last_tick') ~= due then
  stays = false
end
local same = stays and not next(changed) and #gone == 0
local reply = held == 'none' and 'created' or same and 'same' or 'replaced'

-- The same times stay the same: a tick that is due just now is not lost.
if stays then due = stands end
if reply ~= 'same' then
  redis.call('HSET', key, 'revision', revision, 'due', due, unpack(fields))
  redis.call('HSETNX', key, 'created_at', now())
  redis.call('HDEL', key, 'waiting', unpack(gone))
end
redis.call('ZADD', K.schedules(), redis.call('HEXISTS', key, 'paused') == 1 and '+inf' or due, name)
return reply
