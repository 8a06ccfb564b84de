-- Has a session serve other pools from now on.
-- ARGV: session, service
-- Reply: 'serving', or 'lost': the session is not registered (any more)
local session, service = ARGV[1], ARGV[2]
local s = redis.call('HMGET', K.session(session), 'service', 'dead', 'parked')
if not s[1] or s[2] then return 'lost' end
-- Also where an answer of this got lost: it may have taken under the old service since.
unpark(session, s[3] or s[1])
redis.call('HSET', K.session(session), 'service', service)
redis.call('HDEL', K.session(session), 'parked')
return 'serving'
