-- Lets the rows of a held batch be worked on.
-- ARGV: id, retention in ms
-- Reply: {'released', rows}, {'before', status, rows} (it was released before), {'over', status}, or 'missing'
local batch, job = ARGV[1], K.job(ARGV[1])
if redis.call('TYPE', job).ok ~= 'hash' then return 'missing' end
local rows = redis.call('HGET', K.batch(batch), 'rows')
if not rows then return 'missing' end
local b = redis.call('HMGET', job, 'status', 'aborted_at')
if FINAL[b[1]] or b[2] then return {'over', b[1] or ''} end
if b[1] ~= 'held' then return {'before', b[1] or '', rows} end
release_batch(batch, tonumber(ARGV[2]))
return {'released', rows}
