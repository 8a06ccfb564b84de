-- Moves what an old-layout queue (one list per database host) holds to the users' own queues, to be taken first.
-- ARGV: leader's session, term, host
-- Reply: {'more' or 'empty', moved}, or 'not_leader'
if not leads(ARGV[1], ARGV[2]) then return 'not_leader' end
local old, moved, users = K.old_queue(ARGV[3]), 0, {}
if redis.call('TYPE', old).ok ~= 'list' then return {'empty', 0} end
-- The oldest stands at the right end; moved newest first, it ends up foremost in its user's queue.
for _ = 1, 1000 do
  local id = redis.call('LPOP', old)
  if not id then break end
  local user = try('HGET', K.job(id), 'user')
  if not user or not is_user(user) then
    reject(id, user or '', 'it stood in the old queue of host ' .. ARGV[3] .. ', but no hash tells its user')
  elseif put_first(id, 'sql:' .. user) then
    users[user] = true
    moved = moved + 1
  end
end
for user in pairs(users) do
  place_and_wake('sql:' .. user)
end
return {redis.call('EXISTS', old) == 1 and 'more' or 'empty', moved}
