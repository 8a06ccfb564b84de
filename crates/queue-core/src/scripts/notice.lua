-- Looks at users whose queues somebody else has pushed to, and enters those with work into the ready-sets.
-- ARGV: users
-- Reply: how many of them became ready
local count = 0
for _, user in ipairs(ARGV) do
  if not is_user(user) then
    -- Bounded: what is left is found again by its key.
    try('SREM', K.queued_users(), user)
    for _ = 1, 100 do
      local id = try('RPOP', K.queue(user))
      if not id then break end
      set_aside(id, user, 'its queue belongs to no valid user name')
    end
  else
    if redis.call('TYPE', K.queue(user)).ok == 'list' then try('SADD', K.queued_users(), user) end
    local pool, new = place(user)
    if new then
      count = count + 1
      wake_one(pool)
    end
  end
end
return count
