-- Gives pools other capacities.
-- ARGV: pool and capacity in turn; an empty capacity means the default of whoever takes
-- Reply: how many pools may have something to take
for i = 1, #ARGV, 2 do
  if ARGV[i + 1] == '' then
    redis.call('HDEL', K.pool(ARGV[i]), 'capacity')
  else
    redis.call('HSET', K.pool(ARGV[i]), 'capacity', ARGV[i + 1])
  end
end
-- Pools that were full may have room now, also those whose default is another: all that run something are looked at.
for _, text in ipairs(redis.call('HVALS', K.claims())) do
  local pool = string.match(text, '^[^\t]*\t[^\t]*\t([^\t]*)')
  if redis.call('EXISTS', K.ready(pool)) == 1 then list_pool(pool) end
end
local count = 0
for _, class in ipairs(redis.call('SMEMBERS', K.classes())) do count = count + redis.call('ZCARD', K.pools(class)) end
return count
