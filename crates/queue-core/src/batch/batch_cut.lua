-- Leaves the last rows of a chunk to others: they become a chunk of their own at the front of its line.
-- ARGV: session, id, fence, how many rows it keeps, what became so far of these and of the others: results, packed, and their counts,
--   each ('' for nothing)
-- Reply: 'cut', 'stale' (nothing was done: the claim is not the caller's any more), or 'over' (its batch takes no more results)
local session, id, fence, keep = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
local claim = claim_of(id)
if not claim or claim.session ~= session or claim.fence ~= fence then return 'stale' end
local what, batch, block, first, count = part_of(id)
if what ~= 'rows' or redis.call('TYPE', K.job(id)).ok ~= 'hash' then return 'over' end
-- Cut before, and the answer was lost; or there is nothing to cut.
if keep >= count or keep < 1 then return 'cut' end
local rest = chunk_id(batch, block, first + keep)
local inherited = redis.call('HMGET', K.job(id), unpack(INHERITED))
write_part(rest, claim.user, chunk_part(batch, block, first + keep, count - keep, ARGV[7] ~= ''), band_of(id), inherited)
for _, name in ipairs({'attempts', 'unclean', 'lost_worker', 'history'}) do
  local value = redis.call('HGET', K.job(id), name)
  if value then redis.call('HSET', K.job(rest), name, value) end
end
if ARGV[7] ~= '' then redis.call('HSET', K.job(rest), 'partial', ARGV[7], 'partial_counts', ARGV[8]) end
redis.call('HSET', K.job(id), 'part', chunk_part(batch, block, first, keep, ARGV[5] ~= ''), 'partial', ARGV[5], 'partial_counts',
  ARGV[6], 'updated_at', now())
redis.call('HSET', K.batch_parts(batch), id, keep, rest, count - keep)
local line = line_of(claim.pool, claim.user)
if put_first(rest, line) then place_and_wake(line) end
return 'cut'
