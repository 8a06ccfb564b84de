-- Leaves the last rows of a chunk to others: they become a chunk of their own at the front of its line.
-- ARGV: session, id, fence, how many rows it keeps, what became so far of these and of the others: results, packed, and their counts,
--   each ('' for nothing)
-- Reply: 'cut', 'stale' (nothing was done: the claim is not the caller's any more), or 'over' (its batch takes no more results)
local OF_ATTEMPTS = {'attempts', 'unclean', 'lost_worker', 'history'}
local session, id, fence, keep = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local claim = claim_of(id)
if not claim or claim.session ~= session or claim.fence ~= fence then return 'stale' end
local what, batch, block, first, count = part_of(id)
if what ~= 'rows' or redis.call('TYPE', K.job(id)).ok ~= 'hash' then return 'over' end
-- Cut before, and the answer was lost; or there is nothing to cut.
if keep >= count or keep < 1 then return 'cut' end
local rest, left = chunk_id(batch, block, first + keep), count - keep
local inherited = redis.call('HMGET', K.job(id), unpack(INHERITED))
local line, band, more = line_of(claim.pool, claim.user), band_of(id), {}
for i, value in ipairs(redis.call('HMGET', K.job(id), unpack(OF_ATTEMPTS))) do
  if value then append(more, OF_ATTEMPTS[i], value) end
end
local has_partial = ARGV[7] ~= ''
if has_partial then append(more, 'partial', ARGV[7], 'partial_counts', ARGV[8]) end
write_part(rest, claim.user, chunk_part(batch, block, first + keep, left, has_partial), band, inherited, unpack(more))
-- From here on it is a chunk, and the rows are its.
redis.call('HSET', K.batch_parts(batch), id, keep, rest, left)
redis.call('HSET', K.job(id), 'part', chunk_part(batch, block, first, keep, ARGV[5] ~= ''), 'partial', ARGV[5], 'partial_counts',
  ARGV[6], 'updated_at', now())
if put_first(rest, line) then place_and_wake(line) end
return 'cut'
