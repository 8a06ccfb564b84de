-- Abandons an execution of a flow that failed or was stopped: no other launch goes on from it.
-- ARGV: id
-- Reply: 'abandoned', 'running', 'done', or 'missing'
local job = K.job(ARGV[1])
local status = is_flow(ARGV[1]) and try('HGET', job, 'status')
if not status then return 'missing' end
if not FINAL[status] then return 'running' end
if status == 'done' then return 'done' end
redis.call('HSETNX', job, 'abandoned_at', now())
return 'abandoned'
