-- Gives pools other capacities. What was full may have room now.
-- ARGV: pool and capacity in turn; an empty capacity means the default of whoever takes, and '=' that it stays, but for a default that
--   has changed
-- Reply: 'set'
for i = 1, #ARGV, 2 do
  local pool, capacity = ARGV[i], ARGV[i + 1]
  if capacity == '' then
    redis.call('HDEL', K.pool(pool), 'capacity')
  elseif capacity ~= '=' then
    redis.call('HSET', K.pool(pool), 'capacity', capacity)
  end
  if redis.call('EXISTS', K.ready(pool)) == 1 then list_pool(pool) end
end
return 'set'
