-- Registers a worker's session and the capacities that its configuration states.
-- ARGV: session, service, host, pid, major version, minor version, then pool and capacity in turn
-- Reply: 'open', or the version of the protocol that this server's keys are of, if its major is another
local session, service, host, pid, major, minor = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local version = redis.call('GET', K.version())
if version and string.match(version, '^(%d+)') ~= major then return version end
if not version then redis.call('SET', K.version(), major .. '.' .. minor) end
redis.call('HSET', K.session(session), 'host', host, 'pid', pid, 'service', service, 'started_at', now(), 'beat', 0, 'take', 0)
redis.call('SADD', K.sessions(), session)
for i = 7, #ARGV, 2 do
  redis.call('HSET', K.pool(ARGV[i]), 'capacity', ARGV[i + 1])
  list_pool(ARGV[i])
end
return 'open'
