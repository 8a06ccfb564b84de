-- What the functions of the status tracker share.
-- Words used here: a RECORD is the hash of a job that an application runs itself. Its STATUS is one of five words, or a number
-- that has a meaning to the application alone. An id stands in the index of its record's status and in no other one.

local WORDS = {'pending', 'in_progress', 'failed', 'succeeded', 'ignored'}
-- Most bytes of a field that is read. Ours are smaller; others may have written it.
local MAX_READ = 131072

local function record_of(tracker, id) return K.track(tracker .. ':' .. id) end
local function index_of(tracker, status) return K.track_status(tracker .. ':' .. status) end

-- An error if others have made something else of a key that is about to be written: a script that fails half-way is not rolled
-- back.
local function wrong_type(tracker, id, ...)
  local wanted = {[record_of(tracker, id)] = 'hash', [K.track_locks(tracker)] = 'zset', [K.track_expiring(tracker)] = 'zset'}
  for _, status in ipairs({...}) do wanted[index_of(tracker, status)] = 'zset' end
  for key, kind in pairs(wanted) do
    local held = redis.call('TYPE', key).ok
    if held ~= 'none' and held ~= kind then
      return redis.error_reply('WRONGTYPE ' .. key .. ' holds a ' .. held .. ', not a ' .. kind)
    end
  end
end

-- What the scripts compare of a record; nil if there is none. Of a key of another type nothing is seen.
local function look_at(tracker, id)
  local r = try('HMGET', record_of(tracker, id), 'status', 'codes', 'keep_ms', 'lock', 'lock_at', 'lock_until', 'fence', 'retry')
  if not r or not r[1] then return nil end
  return {status = r[1], codes = r[2] or '', keep_ms = tonumber(r[3] or nil) or 0, lock = r[4], lock_at = r[5] or '',
    lock_until = tonumber(r[6] or nil) or 0, fence = tonumber(r[7] or nil) or 0, retry = tonumber(r[8] or nil) or 0}
end

-- The application's number for a status. One that is none of the five words is such a number.
local function code_of(codes, status)
  local at = 0
  for code in string.gmatch(codes, '%d+') do
    at = at + 1
    if WORDS[at] == status then return code end
  end
  return status
end

-- Gives a record another status and the fields and values that go with it. Only in progress it is locked; once it has
-- ended for good it is kept for as long as its application said. The record comes first, and says what it `was`: by it the indexes are
-- put right should that break off.
local function move_record(tracker, id, r, to, fields)
  local record = record_of(tracker, id)
  redis.call('HSET', record, 'status', to, 'code', code_of(r.codes, to), 'was', r.status or to, 'update_at', now(), unpack(fields))
  if r.status and r.status ~= to then redis.call('ZREM', index_of(tracker, r.status), id) end
  redis.call('ZADD', index_of(tracker, to), int(this.now_us), id)
  if to == 'succeeded' or to == 'failed' or to == 'ignored' then
    feed('tracked', tracker .. ':' .. id, function() return fed_of(record) end)
  end
  if to ~= 'in_progress' then
    redis.call('HDEL', record, 'lock', 'lock_at', 'lock_until')
    redis.call('ZREM', K.track_locks(tracker), id)
  end
  if r.keep_ms > 0 and (to == 'succeeded' or to == 'ignored') then
    redis.call('PEXPIRE', record, int(r.keep_ms))
    redis.call('ZADD', K.track_expiring(tracker), int(this.now_ms + r.keep_ms), id)
  else
    redis.call('PERSIST', record)
    redis.call('ZREM', K.track_expiring(tracker), id)
  end
end

-- Takes records that have expired out of the indexes.
local function trim(tracker)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', K.track_expiring(tracker), '-inf', int(this.now_ms), 'LIMIT', 0, 100)) do
    local left = redis.call('PTTL', record_of(tracker, id))
    if left == -2 then
      try('ZREM', index_of(tracker, 'succeeded'), id)
      try('ZREM', index_of(tracker, 'ignored'), id)
    end
    -- One that others have given another lifetime waits for its end, or has none.
    if left > 0 then
      redis.call('ZADD', K.track_expiring(tracker), int(this.now_ms + left), id)
    else
      redis.call('ZREM', K.track_expiring(tracker), id)
    end
  end
end

-- Enters a lock among those of its tracker, by when it expires.
local function list_lock(tracker, id, until_ms) redis.call('ZADD', K.track_locks(tracker), int(until_ms * 1000), id) end

-- Gives a lock that is held another time to live.
local function lock_for(tracker, id, expire_ms)
  redis.call('HSET', record_of(tracker, id), 'lock_until', int(this.now_ms + expire_ms))
  list_lock(tracker, id, this.now_ms + expire_ms)
end

-- What does not agree with a record of a tracker, as what puts it right: the indexes, its lock, its lifetime. Nil where all does.
local function faults_of_record(tracker, id)
  local r, record = look_at(tracker, id), record_of(tracker, id)
  local was = r and (try('HGET', record, 'was') or r.status)
  if not r or wrong_type(tracker, id, r.status, was, unpack(WORDS)) then return nil end
  local repairs = {}
  local function unless(holds, ...)
    local command = {...}
    if not holds then repairs[#repairs + 1] = function() redis.call(unpack(command)) end end
  end
  local function score(key) return redis.call('ZSCORE', key, id) end
  for _, status in ipairs({was, unpack(WORDS)}) do
    if status ~= r.status then unless(not score(index_of(tracker, status)), 'ZREM', index_of(tracker, status), id) end
  end
  unless(score(index_of(tracker, r.status)), 'ZADD', index_of(tracker, r.status), int(this.now_us), id)
  local locks, expiring, left = K.track_locks(tracker), K.track_expiring(tracker), redis.call('PTTL', record)
  if r.status == 'in_progress' then
    if r.lock then unless(tonumber(score(locks) or 0) == r.lock_until * 1000, 'ZADD', locks, int(r.lock_until * 1000), id) end
  else
    unless(not r.lock, 'HDEL', record, 'lock', 'lock_at', 'lock_until')
    unless(not score(locks), 'ZREM', locks, id)
  end
  if r.keep_ms > 0 and (r.status == 'succeeded' or r.status == 'ignored') then
    unless(left > 0, 'PEXPIRE', record, int(r.keep_ms))
    unless(score(expiring), 'ZADD', expiring, int(this.now_ms + (left > 0 and left or r.keep_ms)), id)
  else
    unless(left < 0, 'PERSIST', record)
    unless(not score(expiring), 'ZREM', expiring, id)
  end
  if #repairs == 0 then return nil end
  return function() for _, repair in ipairs(repairs) do repair() end end
end

-- The fields that say that the holder of an expired lock is lost: an attempt that failed.
local function lost(record, r)
  local error = 'its lock expired: the holder was lost'
  return {'retry', int(r.retry + 1), 'errors', cjson.encode({error = error, trace = ''}), 'history', history_with(record,
    {fence = int(r.fence), holder = r.lock, started_at = r.lock_at, ended_at = now(), outcome = 'lost', error = error})}
end

-- The attempt that ended under a lock, if the record's history still has it. No two attempts have the same lock.
local function ended_under(record, lock)
  if redis.call('HSTRLEN', record, 'history') > MAX_HISTORY then return nil end
  for line in string.gmatch(redis.call('HGET', record, 'history') or '', '[^\n]+') do
    local sound, attempt = pcall(cjson.decode, line)
    if sound and type(attempt) == 'table' and attempt.holder == lock then return attempt end
  end
end
