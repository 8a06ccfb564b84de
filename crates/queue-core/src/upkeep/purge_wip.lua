-- Takes out of a user's work-in-progress list what is not being worked on: entries of a worker that died, ours or foreign.
-- ARGV: leader's session, term, user
-- Reply: the number removed, or 'not_leader'. Of a long list the front is looked at, and what stays of that is the end then
if not leads(ARGV[1], ARGV[2]) then return 'not_leader' end
local user, stay = ARGV[3], {}
local wip = K.wip(user)
local ids = try('LRANGE', wip, 0, 499) or {}
for _, id in ipairs(ids) do
  local works = redis.call('HEXISTS', K.claims(), id) == 1
  if not works then
    local status = try('HGET', K.job(id), 'status')
    -- One that still says `running` may be a foreign worker's.
    works = status == 'running' and not is_over(status, try('HGET', K.job(id), 'fallback_status'))
  end
  if works then append(stay, id) end
end
if #stay < #ids then
  if #stay > 0 then redis.call('RPUSH', wip, unpack(stay)) end
  redis.call('LTRIM', wip, #ids, -1)
end
if redis.call('EXISTS', wip) == 0 then try('SREM', K.wip_users(), user) end
return #ids - #stay
