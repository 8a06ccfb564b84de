-- Lets the rows of a held batch be worked on.
-- ARGV: id, retention in ms
-- Reply: {'released', rows}, {'before', status, rows} (it was released before), {'over', status}, or 'missing'
local batch, job = ARGV[1], K.job(ARGV[1])
if redis.call('TYPE', job).ok ~= 'hash' then return 'missing' end
local b = redis.call('HMGET', job, 'kind', 'status', 'rows', 'aborted_at')
if b[1] ~= 'batch' then return 'missing' end
if FINAL[b[2]] or b[4] then return {'over', b[2]} end
if b[2] ~= 'held' then return {'before', b[2], b[3]} end
release_batch(batch, tonumber(ARGV[2]))
return {'released', b[3]}
