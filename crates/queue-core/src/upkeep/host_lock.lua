-- Holds the foreign layout's lock of a database host, so that a foreign worker never schedules the host while we do; where
-- one holds it already, our takes from that host's pool pause.
-- ARGV: leader's session, term, TTL in ms, hosts
-- Reply: the hosts that a foreign worker schedules, or 'not_leader'
local session, term, ttl_ms = ARGV[1], ARGV[2], ARGV[3]
if not leads(session, term) then return 'not_leader' end
local foreign = {}
for i = 4, #ARGV do
  local host = ARGV[i]
  local lock, pool = K.host_lock(host), 'sql:' .. host
  local holder = try('GET', lock)
  -- Ours are marked, so that a new leader takes over its predecessor's.
  if holder == false or (holder and string.sub(holder, 1, 8) == 'drayman:') then
    redis.call('SET', lock, 'drayman:' .. session, 'PX', ttl_ms)
    if redis.call('HDEL', K.pool(pool), 'blocked') == 1 then
      list_pool(pool)
      wake_one(pool)
    end
  else
    redis.call('HSET', K.pool(pool), 'blocked', BLOCKED)
    foreign[#foreign + 1] = host
  end
end
return foreign
