-- Takes a load back that is not complete; a batch that has nothing else goes with it.
-- ARGV: id, key of the load
-- Reply: 1 if there was something, else 0
local batch, key = ARGV[1], ARGV[2]
local job, blocks = K.job(batch), K.batch_blocks(batch)
local load, count = string.match(redis.call('HGET', blocks, 'load:' .. key) or '', '^(%d+) open (%d+)')
if not load or try('HGET', job, 'status') ~= 'held' then return 0 end
-- Its rows count: only its mark is missing, for the call that ended it broke off.
if redis.call('HEXISTS', K.batch(batch), 'joined:' .. load) == 1 then return 0 end
for place = 0, tonumber(count) - 1 do
  redis.call('HDEL', K.batch_rows(batch), load .. '.' .. place)
  redis.call('HDEL', blocks, load .. '.' .. place)
end
redis.call('HDEL', blocks, 'load:' .. key)
if redis.call('EXISTS', blocks) == 0 then
  redis.call('DEL', job, K.batch(batch), K.batch_rows(batch))
  redis.call('ZREM', K.batches(), batch)
end
return 1
