-- One heartbeat keeps all claims of a session.
-- ARGV: session, number of claims that the worker believes it holds
-- Reply: {'lost'}, or {'alive', ids to cancel, claims as id and fence in turn}; the claims only where the numbers differ
local session, believed = ARGV[1], tonumber(ARGV[2])
local s = redis.call('HMGET', K.session(session), 'beat', 'dead')
if not s[1] or s[2] then return {'lost'} end
redis.call('HSET', K.session(session), 'beat', int(tonumber(s[1]) + 1), 'held', believed, 'beat_at', now())
local claims, held = {}, redis.call('HKEYS', K.work(session))
if #held ~= believed then
  local ours = {}
  for _, id in ipairs(held) do
    local claim = claim_of(id)
    if claim and claim.session == session then
      ours[#ours + 1] = id
      claims[#claims + 1] = id
      claims[#claims + 1] = claim.fence
    else
      redis.call('HDEL', K.work(session), id)
    end
  end
  held = ours
end
for _, id in ipairs(held) do
  if cancelled_by_hash(id) then redis.call('SADD', K.cancels(session), id) end
end
return {'alive', redis.call('SMEMBERS', K.cancels(session)), claims}
