-- Removes a schedule. The jobs that it has made stay.
-- ARGV: name
-- Reply: 'removed' or 'missing'
local removed = redis.call('UNLINK', K.schedule(ARGV[1]))
return redis.call('ZREM', K.schedules(), ARGV[1]) + removed > 0 and 'removed' or 'missing'
