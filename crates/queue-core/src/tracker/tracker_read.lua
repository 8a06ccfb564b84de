-- Reads records of tracked jobs. Writes nothing.
-- ARGV: tracker, 'one' and id; or tracker, 'list', a status or 'expired' (those whose locks have), 'oldest' or 'newest' first, the score
--   behind which to go on ('' at the beginning), how many at most
-- Reply: the server's time in ms, then for each record {id, its score in the index, values of status, code, create_at, update_at,
--   lock, lock_at, lock_until, retry, data, errors, history}; nil for a value that is absent or too long
local tracker, form = ARGV[1], ARGV[2]
local NAMED = {'status', 'code', 'create_at', 'update_at', 'lock', 'lock_at', 'lock_until', 'retry', 'data', 'errors', 'history'}
local replies = {int(this.now_ms)}

local function read(id, score)
  local record, row = record_of(tracker, id), {id, score}
  for i, name in ipairs(NAMED) do
    row[i + 2] = (try('HSTRLEN', record, name) or MAX_READ + 1) <= MAX_READ and redis.call('HGET', record, name) or false
  end
  replies[#replies + 1] = row
end

if form == 'one' then
  read(ARGV[3], '')
  return replies
end
local status, order, from, most = ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local index, least, greatest = index_of(tracker, status), '-inf', '+inf'
-- As records have it: a lock is over with the ms in which it ends.
if status == 'expired' then index, greatest = K.track_locks(tracker), int(this.now_ms * 1000 + 999) end
if from ~= '' and order == 'oldest' then least = '(' .. from end
if from ~= '' and order == 'newest' then greatest = '(' .. from end
local found
if order == 'oldest' then
  found = redis.call('ZRANGEBYSCORE', index, least, greatest, 'WITHSCORES', 'LIMIT', 0, most)
else
  found = redis.call('ZREVRANGEBYSCORE', index, greatest, least, 'WITHSCORES', 'LIMIT', 0, most)
end
for i = 1, #found, 2 do read(found[i], found[i + 1]) end
return replies
