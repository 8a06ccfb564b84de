-- Hands rows of a batch over: makes the batch if it is not there, takes blocks of a load, and ends the load.
-- ARGV: id, user, key of the load, place of the first block of this call in its load, 'more' or 'end' (the load is complete with this
--   call), 'hold' or 'release' (what becomes of the batch then), most rows and most bytes of a batch, retention in ms, 'new' or 'append',
--   number of fields and values of a new batch, fields and values in turn, then for each block: packed rows, number of rows, bytes,
--   first line, last line
-- Reply: {'loaded', rows of the batch}, {'exists', status, rows} (this load was complete before: nothing was written), 'missing',
--   {'refused', reason}, {'over', status} (it takes no more rows), 'differs' (another block stands there: the key is another load's),
--   {'too_many', 'rows' or 'bytes', limit}, or {'no_room', bytes of memory used, bytes above which nothing new is accepted}
local batch, user, key, place = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local is_end, is_release = ARGV[5] == 'end', ARGV[6] == 'release'
local most_rows, most_bytes, retention_ms = tonumber(ARGV[7]), tonumber(ARGV[8]), tonumber(ARGV[9])
local is_new, m = ARGV[10] == 'new', tonumber(ARGV[11])
local fields = {unpack(ARGV, 12, 11 + m)}
local job, own, blocks = K.job(batch), K.batch(batch), K.batch_blocks(batch)
local used, mark = string.match(redis.call('GET', K.full()) or '', '^(%d+) (%d+)$')

local held = redis.call('TYPE', job).ok
if held == 'none' then
  -- Its first blocks may have been taken back meanwhile: what is left of it would be a batch of its own.
  if not is_new or place > 0 then return 'missing' end
  if is_for_parts(batch) then return {'refused', FOR_PARTS} end
  if used then return {'no_room', used, mark} end
  if fields[1] == nil then return 'missing' end
  -- Whatever is left of one whose record somebody has removed.
  remove_record(batch)
  local keep = {}
  for f = 1, m, 2 do
    if fields[f] == 'keep' then keep = {'keep', fields[f + 1]} end
  end
  -- The record comes last: what broke off before is begun anew.
  redis.call('HSET', own, 'user', user, 'rows', 0, 'left', 0, 'done', 0, 'skipped', 0, 'failed', 0, 'aborted', 0, 'bytes', 0,
    'loads', 0, unpack(keep))
  redis.call('ZADD', K.batches(), int(this.now_ms), batch)
  redis.call('HSET', job, 'user', user, 'kind', 'batch', 'status', 'held', 'created_at', now(), 'updated_at', now(), 'rows', 0,
    'left', 0, 'done', 0, 'skipped', 0, 'failed', 0, 'aborted', 0, 'bytes', 0, unpack(fields))
  publish(user, batch, 'held')
elseif held ~= 'hash' then
  return {'refused', 'its key holds a ' .. held .. ', not a hash'}
end
local b = redis.call('HMGET', job, 'status', 'aborted_at')
local o = redis.call('HMGET', own, 'user', 'loads', 'rows', 'bytes')
if not o[1] then return {'refused', 'a job of another kind has this id'} end
if is_new and o[1] ~= user then return {'refused', 'a batch of another user has this id'} end

local entry = redis.call('HGET', blocks, 'load:' .. key)
local load, state, count, rows, bytes = string.match(entry or '', '^(%d+) (%a+) (%d+) (%d+) (%d+)$')
if state == 'done' then
  -- The answer of the call that ended it was lost, or the caller begins anew with the same key.
  if is_end and is_release and b[1] == 'held' then
    release_batch(batch, retention_ms)
  end
  return {'exists', redis.call('HGET', job, 'status') or '', o[3]}
end
if b[1] ~= 'held' or b[2] then return {'over', b[1] or ''} end
if used then return {'no_room', used, mark} end
if not load then
  load, count, rows, bytes = o[2], 0, 0, 0
  redis.call('HINCRBY', own, 'loads', 1)
end
load, count, rows, bytes = tonumber(load), tonumber(count), tonumber(rows), tonumber(bytes)

-- Another load may have come to its end meanwhile; what counts is what the batch has now, with this one.
local new_rows, new_bytes = 0, 0
for i = 12 + m, #ARGV, 5 do
  local at = place + (i - 12 - m) / 5
  if at >= count then
    new_rows = new_rows + tonumber(ARGV[i + 1])
    new_bytes = new_bytes + tonumber(ARGV[i + 2])
  elseif redis.call('HGET', K.batch_rows(batch), load .. '.' .. at) ~= ARGV[i] then
    return 'differs'
  end
end
if place > count then return 'differs' end
-- Its rows count from one command on, which knows it again where this broke off behind it.
local joined = 'joined:' .. load
local is_joined = redis.call('HEXISTS', own, joined) == 1
if is_joined then rows, bytes = 0, 0 end
if tonumber(o[3]) + rows + new_rows > most_rows then return {'too_many', 'rows', most_rows} end
if tonumber(o[4]) + bytes + new_bytes > most_bytes then return {'too_many', 'bytes', most_bytes} end
for i = 12 + m, #ARGV, 5 do
  local at = place + (i - 12 - m) / 5
  if at >= count then
    redis.call('HSET', K.batch_rows(batch), load .. '.' .. at, ARGV[i])
    redis.call('HSET', blocks, load .. '.' .. at, table.concat({ARGV[i + 1], ARGV[i + 2], ARGV[i + 3], ARGV[i + 4]}, ' '))
    count = at + 1
  end
end
rows, bytes = rows + new_rows, bytes + new_bytes
local function note(state)
  redis.call('HSET', blocks, 'load:' .. key, table.concat({load, state, int(count), int(rows), int(bytes)}, ' '))
end
local total = tonumber(o[3])
note('open')
if is_end then
  if count > 0 then redis.call('HSET', blocks, load, int(count)) end
  total = move_counts(batch, {rows = rows, left = rows, bytes = bytes}, joined, '1')
  note('done')
  if is_release then release_batch(batch, retention_ms) end
else
  redis.call('HSET', job, 'updated_at', now())
end
return {'loaded', total}
