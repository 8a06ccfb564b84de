-- Leadership of the maintenance.
-- ARGV: session, TTL in ms, 'hold' (take or renew) or 'resign'
-- Reply: {'leader', term}, {'follower', leader's session}, or {'none', ''} after resigning
local session, ttl_ms, wish = ARGV[1], ARGV[2], ARGV[3]
local text = redis.call('GET', K.leader())
local holder, term
if text then holder, term = string.match(text, '^(.*)\t(%d+)$') end
if wish == 'resign' then
  if holder == session then redis.call('DEL', K.leader()) end
  return {'none', ''}
end
if holder and holder ~= session then
  -- A clock that was set back would keep a dead leader in office until it has caught up.
  if redis.call('PTTL', K.leader()) > 2 * tonumber(ttl_ms) then redis.call('PEXPIRE', K.leader(), ttl_ms) end
  return {'follower', holder}
end
if not holder then term = int(redis.call('INCR', K.term())) end
redis.call('SET', K.leader(), session .. '\t' .. term, 'PX', ttl_ms)
return {'leader', term}
