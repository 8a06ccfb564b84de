-- Takes out of a user's work-in-progress list what is not being worked on: entries of a worker that died, ours or foreign.
-- ARGV: leader's session, term, user
-- Reply: the number removed, or 'not_leader'
if not leads(ARGV[1], ARGV[2]) then return 'not_leader' end
local user, removed = ARGV[3], 0
local wip = K.wip(user)
for _, id in ipairs(try('LRANGE', wip, 0, 999) or {}) do
  if redis.call('HEXISTS', K.claims(), id) == 0 then
    local status = try('HGET', K.job(id), 'status')
    local fallback_status = try('HGET', K.job(id), 'fallback_status')
    -- One that still says `running` may be a foreign worker's.
    if status ~= 'running' or is_over(status, fallback_status) then
      try('LREM', wip, 0, id)
      removed = removed + 1
    end
  end
end
if redis.call('EXISTS', wip) == 0 then try('SREM', K.wip_users(), user) end
return removed
