-- Abandons an execution of a flow that failed or was stopped: no other launch goes on from it.
-- ARGV: id
-- Reply: 'abandoned', 'running', 'done', or 'missing'
local job = K.job(ARGV[1])
local f = try('HMGET', job, 'kind', 'status')
if not f or f[1] ~= 'flow' then return 'missing' end
if not FINAL[f[2]] then return 'running' end
if f[2] == 'done' then return 'done' end
redis.call('HSETNX', job, 'abandoned_at', now)
return 'abandoned'
