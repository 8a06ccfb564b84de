-- What moves rows of batches. A batch is a job of kind 'batch'. K.batch counts its `rows`, `left` (those of
-- which nothing became yet), `done`, `skipped`, `failed`, `aborted`, and says how far they are dealt. Its hash shows the counts to readers,
-- and nothing is counted with what stands there, for others may write it.
-- A PART is a job of kind 'part': a chunk of rows that was dealt, or what is to be done when all have ended.

local INHERITED, chunk_id, chunk_part, write_part, deal, faults_of_batch, move_counts, settle_batch, end_part, abort_batch, release_batch
do

-- The rows of a chunk should take about this long, so that nobody waits long for a place. Where a chunk costs more than that
-- besides, like a transaction over a slow network, they may take as long as it, but no longer than the second time.
local CHUNK_US, LONG_CHUNK_US = 50000, 250000
-- Rows of a chunk while it is not known how long one takes.
local FIRST_ROWS = 10
-- What a part takes over from its batch.
INHERITED = {'app', 'op', 'host', 'database', 'timeout', 'max_attempts', 'backoff', 'retry_delay', 'retry_delay_max',
  'retry_on', 'traceparent'}
-- Whoever is told that a batch is over may not be there at once: for some hours it is tried again.
local TOLD_ATTEMPTS, TOLD_DELAY_MS, TOLD_DELAY_MAX_MS = 50, 1000, 300000

function chunk_id(batch, block, first) return batch .. ':' .. block .. ':' .. int(first) end
function chunk_part(batch, block, first, count, has_partial)
  return table.concat({'rows', batch, block, int(first), int(count), has_partial and 'partial' or nil}, ' ')
end

-- The counts of a batch, which its record shows too.
local NUMBERS_SEEN = {'rows', 'left', 'done', 'skipped', 'failed', 'aborted', 'bytes'}

-- Moves counts of a batch, `by` their names, together with other fields: in one command, so that nothing breaks off in between. What
-- readers see is written anew from them. Returns the batch's rows, and how many are left.
function move_counts(batch, by, ...)
  local counts, flat, seen = redis.call('HMGET', K.batch(batch), unpack(NUMBERS_SEEN)), {...}, {}
  for i, name in ipairs(NUMBERS_SEEN) do
    local count = (tonumber(counts[i] or 0) or 0) + (by[name] or 0)
    seen[2 * i - 1], seen[2 * i] = name, int(count)
    if by[name] then
      counts[i], flat[#flat + 1], flat[#flat + 2] = count, name, int(count)
    end
  end
  if #flat > 0 then redis.call('HSET', K.batch(batch), unpack(flat)) end
  redis.call('HSET', K.job(batch), 'updated_at', now(), unpack(seen))
  return tonumber(counts[1]), tonumber(counts[2])
end

-- Writes the hash of a part of a batch.
function write_part(id, user, part, band, inherited, ...)
  -- Whatever somebody else may have put there.
  redis.call('DEL', K.job(id))
  local fields = {}
  for i, name in ipairs(INHERITED) do
    if inherited[i] then
      fields[#fields + 1] = name
      fields[#fields + 1] = inherited[i]
    end
  end
  redis.call('HSET', K.job(id), 'user', user, 'kind', 'part', 'part', part, 'priority', band, 'status', 'pending', 'created_at',
    now(), 'updated_at', now(), 'enqueued_at', now(), unpack(fields))
  if ... then redis.call('HSET', K.job(id), ...) end
end

-- The first row of a block at or behind a place, as a cursor; nil if there is none.
local function cursor_at(batch, load, place, loads)
  while load < loads do
    local meta = redis.call('HGET', K.batch_blocks(batch), load .. '.' .. place)
    local is_committed = meta and redis.call('HEXISTS', K.batch_blocks(batch), load) == 1
    if is_committed then return table.concat({load, place, 0, (string.match(meta, '^%d+'))}, ' ') end
    load, place = load + 1, 0
  end
  return nil
end

-- Makes the chunk that a batch was dealing: its rows are no longer the batch's, and are written down as nobody's yet.
local function make_chunk(batch, user, id, count)
  local b = redis.call('HMGET', K.job(batch), 'priority', unpack(INHERITED))
  local _, _, block, first = part_named(id)
  write_part(id, user, chunk_part(batch, block, first, count), b[1] or '', {unpack(b, 2, 1 + #INHERITED)})
  redis.call('HSET', K.batch_parts(batch), id, count)
  redis.call('HDEL', K.batch(batch), 'dealing')
end

-- The chunk that a batch was dealing when that broke off, and its rows; nothing if it was made, or its rows are the batch's still.
local function half_dealt(batch)
  local o = redis.call('HMGET', K.batch(batch), 'dealing', 'cursor')
  local id, count = string.match(o[1] or '', '^(%S+) (%d+)$')
  if not id then return nil end
  local _, _, block, first = part_named(id)
  local load, place, at = string.match(o[2] or '', '^(%d+) (%d+) (%d+) ')
  local is_open = load and load .. '.' .. place == block and tonumber(at) == first
  if is_open or redis.call('HEXISTS', K.batch_parts(batch), id) == 1 then return nil end
  return id, tonumber(count)
end

local end_batch

-- Takes results of a chunk back that were kept and not counted, for it goes on.
local function drop_results(batch, block, first)
  local key, mine = K.batch_results(batch), int(first)
  local begins = {}
  for begin in string.gmatch(redis.call('HGET', key, block) or '', '%d+') do
    if begin ~= mine then begins[#begins + 1] = begin .. ' ' end
  end
  redis.call('HDEL', key, block .. ':' .. mine)
  if #begins > 0 then redis.call('HSET', key, block, table.concat(begins)) else redis.call('HDEL', key, block) end
end

-- Puts a batch that is being released behind the others of its line, where it may stand if that broke off before.
local function end_release(batch, retention_ms, is_again)
  local job, own = K.job(batch), K.batch(batch)
  local user, cursor, left = unpack(redis.call('HMGET', own, 'user', 'cursor', 'left'))
  -- Without rows to deal it stands nowhere, and without any it is over; the last of them may have been dealt since it broke off.
  if cursor or tonumber(left) <= 0 then
    redis.call('HSET', job, 'status', 'pending', 'enqueued_at', now(), 'updated_at', now())
    publish(user, batch, 'pending')
  end
  if tonumber(left) <= 0 then
    redis.call('HSET', job, 'status', 'running')
    return settle_batch(batch, retention_ms)
  end
  if cursor then
    local line = line_by_hash(batch, user)
    local queue = queue_of(line, band_of(batch))
    if is_again then take_out(queue, batch) end
    redis.call('LPUSH', queue, batch)
    index(line)
    place_and_wake(line)
  end
  redis.call('HDEL', own, 'releasing')
end

-- What a call that broke off has left of a batch, as what puts it right: what was begun is brought to its end, and what readers see is
-- written anew. Nil where there is no such thing.
function faults_of_batch(batch, retention_ms)
  local user, loads, rows, ended, releasing, aborting, ending, reason = unpack(redis.call('HMGET', K.batch(batch), 'user', 'loads',
    'rows', 'ended', 'releasing', 'aborting', 'ending', 'reason'))
  local go_on, show_anew = nil, nil
  if not user then return nil end
  local held = redis.call('TYPE', K.job(batch)).ok
  -- Nothing of it was handed over.
  if held == 'none' and loads == '0' and rows == '0' then
    return function()
      remove_record(batch)
      redis.call('ZREM', K.batches(), batch)
    end
  end
  if held ~= 'hash' then return nil end
  local uncounted = {}
  for _, part in ipairs(redis.call('HKEYS', K.batch_parts(batch))) do
    local what, _, block, first = part_of(part)
    if what == 'rows' and redis.call('HEXISTS', K.batch_results(batch), block .. ':' .. int(first)) == 1 then
      uncounted[#uncounted + 1] = {block, first}
    end
  end
  local id, count = half_dealt(batch)
  if ending then
    go_on = function() end_batch(batch, ending, retention_ms, reason ~= '' and reason or nil) end
  elseif aborting then
    go_on = function() abort_batch(batch, retention_ms) end
  elseif releasing then
    go_on = function() end_release(batch, retention_ms, true) end
  elseif ended and redis.call('HEXISTS', K.batch_parts(batch), ended) == 1 then
    go_on = function()
      drop_part(batch, ended)
      if tonumber(redis.call('HGET', K.batch(batch), 'left')) <= 0 then settle_batch(batch, retention_ms) end
    end
  elseif #uncounted > 0 then
    go_on = function()
      for _, chunk in ipairs(uncounted) do drop_results(batch, chunk[1], chunk[2]) end
    end
  elseif id then
    go_on = function()
      make_chunk(batch, user, id, count)
      local line = line_by_hash(id, user)
      if put_first(id, line) then place_and_wake(line) end
    end
  end
  local seen = redis.call('HMGET', K.job(batch), unpack(NUMBERS_SEEN))
  for i, number in ipairs(redis.call('HMGET', K.batch(batch), unpack(NUMBERS_SEEN))) do
    if number ~= seen[i] then
      show_anew = function() move_counts(batch, {}) end
      break
    end
  end
  return go_on, show_anew
end

-- Deals the next rows of a batch as a chunk. Returns its id, and whether others are left to deal.
function deal(batch, user)
  local job, own = K.job(batch), K.batch(batch)
  local o = redis.call('HMGET', own, 'cursor', 'pace', 'loads', 'dealing')
  local begun, rows = nil, nil
  if o[4] then begun, rows = half_dealt(batch) end
  if begun then
    make_chunk(batch, user, begun, rows)
    return begun, o[1] ~= false
  end
  local load, place, at, of = string.match(o[1], '^(%d+) (%d+) (%d+) (%d+)$')
  load, place, at, of = tonumber(load), tonumber(place), tonumber(at), tonumber(of)
  local pace = tonumber(o[2] or nil)
  local count = math.max(1, math.min(pace and math.floor(CHUNK_US / math.max(1, pace)) or FIRST_ROWS, of - at))
  local block = load .. '.' .. place
  local id = chunk_id(batch, block, at)
  local cursor
  if at + count < of then
    cursor = table.concat({load, place, at + count, of}, ' ')
  else
    cursor = cursor_at(batch, load, place + 1, tonumber(o[3]))
  end
  -- From here on the rows are the chunk's, which is known by its name until it is made.
  local dealing = id .. ' ' .. int(count)
  if cursor then
    redis.call('HSET', own, 'cursor', cursor, 'dealing', dealing)
  else
    redis.call('HSET', own, 'dealing', dealing)
    redis.call('HDEL', own, 'cursor')
  end
  make_chunk(batch, user, id, count)
  if redis.call('HGET', job, 'status') == 'pending' then
    redis.call('HSET', job, 'status', 'running', 'started_at', now(), 'updated_at', now())
    publish(user, batch, 'running')
  end
  return id, cursor ~= nil
end

-- Queues a part that is to be done once the rows have ended.
local function queue_part(batch, what, user, band, ...)
  local id = batch .. ':' .. what
  local inherited = redis.call('HMGET', K.job(batch), unpack(INHERITED))
  write_part(id, user, what .. ' ' .. batch, band, inherited, ...)
  local line = line_by_hash(id, user)
  if put_first(id, line) then place_and_wake(line) end
end

-- A batch is over: its record says how, the time of all that belongs to it begins, and its application is told.
function end_batch(batch, files, retention_ms, reason)
  local job, own = K.job(batch), K.batch(batch)
  local b = redis.call('HMGET', job, 'app', 'aborted_at')
  local o = redis.call('HMGET', own, 'user', 'failed', 'bytes', 'keep')
  local user, status = o[1], (b[2] and 'cancelled') or ((reason or tonumber(o[2]) > 0) and 'failed') or 'done'
  retention_ms = tonumber(o[4] or nil) or retention_ms
  redis.call('HSET', own, 'over', 0, 'ending', files, 'reason', reason or '')
  -- Whatever others have written there: the record says how it ended.
  move_counts(batch, {})
  redis.call('HSET', job, 'status', status, 'ended_at', now(), 'updated_at', now(), 'files', files)
  if reason then redis.call('HSET', job, 'failed_reason', reason) end
  redis.call('DEL', K.batch_parts(batch))
  for _, key in ipairs({own, K.batch_rows(batch), K.batch_blocks(batch), K.batch_results(batch)}) do
    redis.call('PEXPIRE', key, retention_ms)
  end
  file(batch, user, status, retention_ms, false, tonumber(o[3]))
  if b[1] then
    queue_part(batch, 'done', user, 'high', 'max_attempts', TOLD_ATTEMPTS, 'backoff', 'exponential', 'retry_delay', TOLD_DELAY_MS,
      'retry_delay_max', TOLD_DELAY_MAX_MS)
  end
  redis.call('HDEL', own, 'pace', 'loads', 'ended', 'releasing', 'aborting', 'ending', 'reason')
end

-- All rows have ended. Where some of them wrote output text, it is to be assembled first.
function settle_batch(batch, retention_ms)
  local o = redis.call('HMGET', K.batch(batch), 'user', 'has_files')
  if not o[2] then return end_batch(batch, '{}', retention_ms) end
  redis.call('HSET', K.batch_parts(batch), batch .. ':files', 0)
  queue_part(batch, 'files', o[1], 'high')
end

-- Keeps what became of rows of a chunk, and counts them, with other fields of the batch. Returns how many rows are left.
local function keep_results(batch, block, first, results, done, failed, skipped, has_files, ...)
  local key = K.batch_results(batch)
  local begins, mine = redis.call('HGET', key, block) or '', int(first) .. ' '
  -- They may be there already, of an end that broke off.
  if not string.find(' ' .. begins, ' ' .. mine, 1, true) then begins = begins .. mine end
  redis.call('HSET', key, block .. ':' .. int(first), results, block, begins)
  local more = {...}
  if has_files then append(more, 'has_files', '1') end
  local _, left = move_counts(batch, {done = done, failed = failed, skipped = skipped, bytes = #results, left = 0 - done - failed},
    unpack(more))
  return left
end

-- A chunk whose rows have all ended. `says` has the `results`, packed, and how many are `done`, `failed` and `skipped`.
local function end_chunk(id, user, says, retention_ms)
  local _, batch, block, first, count = part_of(id)
  if tonumber(says.done) + tonumber(says.failed) ~= count then
    -- Rows of it have not ended. They go back: nobody else would.
    record(id, user, 'status', 'pending', 'part', chunk_part(batch, block, first, count))
    put_first(id, line_by_hash(id, user))
    return
  end
  -- It has ended with the command that counts its rows: whatever of it is left behind that is no part any more.
  local more = {'ended', id}
  -- From take to end it has waited too: for a thread, for Redis, for other chunks. That is no row's time.
  local own, fixed = tonumber(says.row_us or nil), tonumber(says.fixed_us or nil)
  if own and fixed then
    own = math.max(0.01, own * CHUNK_US / math.min(math.max(CHUNK_US, fixed), LONG_CHUNK_US))
    local pace = tonumber(redis.call('HGET', K.batch(batch), 'pace') or 0)
    -- By factors: one chunk that was a thousand times slower is forgotten after a few.
    pace = pace > 0 and pace ^ 0.6 * own ^ 0.4 or own
    more[3], more[4] = 'pace', string.format('%.2f', pace)
  end
  local left = keep_results(batch, block, first, says.results, tonumber(says.done), tonumber(says.failed),
    tonumber(says.skipped or 0), says.has_files == '1', unpack(more))
  drop_part(batch, id)
  if left <= 0 then settle_batch(batch, retention_ms) end
end

-- The end of a part, as its worker says it.
function end_part(id, user, says, retention_ms)
  local what, batch = part_of(id)
  -- Its batch was aborted meanwhile.
  if not what then return redis.call('DEL', K.job(id)) end
  if what == 'rows' then return end_chunk(id, user, says, retention_ms) end
  if what ~= 'files' then return end
  drop_part(batch, id)
  -- The rows have ended: whoever removed or rewrote the record since has decided otherwise.
  if try('HGET', K.job(batch), 'status') == 'running' then
    local reason = says.failed_reason ~= '' and says.failed_reason or nil
    end_batch(batch, says.files or '{}', retention_ms, reason)
  end
end

-- A chunk that ended its workers before they could even look at it: its rows have failed.
lost_part = function(id, user, reason)
  local what, _, _, _, count = part_of(id)
  if what ~= 'rows' then
    if what ~= 'files' then return false end
    end_part(id, user, {failed_reason = reason}, MAX_REJECTED_MS)
    return true
  end
  local row = {2, '', {{msgid = 10, errcode = 'worker_lost', vals = {reason}}}}
  local rows = {}
  for i = 1, count do rows[i] = row end
  end_part(id, user, {results = cmsgpack.pack(rows), done = 0, failed = count}, MAX_REJECTED_MS)
  return true
end

-- Ends a batch early: rows of which nothing became yet are aborted at once, whoever works on some is told. What had ended before
-- is kept. Returns {'aborted'}, or {'over', status}. One that broke off is brought to its end.
function abort_batch(batch, retention_ms)
  local job, own = K.job(batch), K.batch(batch)
  local b = redis.call('HMGET', job, 'status', 'aborted_at')
  local o = redis.call('HMGET', own, 'user', 'left', 'aborting')
  -- Nothing is left to abort where all rows have ended and their files are being assembled.
  if not o[3] and (FINAL[b[1]] or b[2] or (b[1] == 'running' and tonumber(o[2]) <= 0)) then return {'over', b[1] or ''} end
  -- From here on no rows are dealt, and it ends.
  redis.call('HSET', own, 'aborting', now())
  redis.call('HDEL', own, 'cursor', 'dealing', 'releasing')
  for _, id in ipairs(redis.call('HKEYS', K.batch_parts(batch))) do
    local _, _, block, first, count = part_of(id)
    local p = try('HMGET', K.job(id), 'partial', 'partial_counts', 'status') or {}
    local done, failed, skipped, has_files = string.match(p[2] or '', '^(%d+) (%d+) (%d+) (%d)$')
    done, failed, skipped = tonumber(done), tonumber(failed), tonumber(skipped)
    -- What ended at an earlier attempt counts, also while others of its chunk are tried again; but nothing that can't be so.
    if block and done and p[1] and done + failed <= count and skipped <= done then
      keep_results(batch, block, first, p[1], done, failed, skipped, has_files == '1', 'ended', id)
    end
    local claim = claim_of(id)
    if claim then
      ask_to_cancel(id, claim)
    elseif p[3] == 'scheduled' then
      unschedule(id)
      drop_part(batch, id)
    end
    -- One that stands in its line is dropped where its turn comes.
    redis.call('HDEL', K.batch_parts(batch), id)
  end
  local left = tonumber(redis.call('HGET', own, 'left'))
  move_counts(batch, {aborted = left, left = -left})
  redis.call('HSET', job, 'aborted_at', now(), 'status', 'running', 'updated_at', now())
  local line = line_by_hash(batch, o[1])
  local queue = queue_of(line, band_of(batch))
  if (try('LLEN', queue) or 0) <= 1000 then
    try('LREM', queue, 0, batch)
    place(line)
  end
  settle_batch(batch, retention_ms)
  redis.call('HDEL', own, 'aborting')
  return {'aborted'}
end

-- Lets the rows of a held batch be dealt. Rows of loads that were never finished are nobody's.
function release_batch(batch, retention_ms)
  local own, blocks = K.batch(batch), K.batch_blocks(batch)
  local loads = tonumber(redis.call('HGET', own, 'loads'))
  local fields = redis.call('HGETALL', blocks)
  for i = 1, #fields, 2 do
    local load, count = string.match(fields[i + 1], '^(%d+) open (%d+)')
    if load and string.sub(fields[i], 1, 5) == 'load:' and redis.call('HEXISTS', own, 'joined:' .. load) == 0 then
      for place = 0, tonumber(count) - 1 do
        redis.call('HDEL', K.batch_rows(batch), load .. '.' .. place)
        redis.call('HDEL', blocks, load .. '.' .. place)
      end
      redis.call('HDEL', blocks, fields[i])
    end
  end
  local cursor = cursor_at(batch, 0, 0, loads)
  redis.call('HSET', own, 'releasing', now(), unpack(cursor and {'cursor', cursor} or {}))
  return end_release(batch, retention_ms)
end

-- For steps of flows whose rows these are.
release_rows, abort_rows = release_batch, abort_batch

end
