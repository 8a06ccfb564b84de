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
    local line = 'sql:' .. user
    if redis.call('TYPE', K.queue(user)).ok == 'list' then index(line) end
    -- Tasks that were pushed last need not wait for the SQL jobs before them: each goes to the line of its handler.
    local pushed = {}
    for _ = 1, 1000 do
      local id = redis.pcall('LINDEX', K.queue(user), 0)
      if type(id) ~= 'string' or not is_id(id) or line_by_hash(id, user) == line then break end
      local verdict, moved = look(id, line)
      if verdict ~= 'moves' then break end
      redis.call('LPOP', K.queue(user))
      pushed[#pushed + 1] = {id, moved}
    end
    -- The one pushed first stands last here.
    for at = #pushed, 1, -1 do move(pushed[at][1], pushed[at][2]) end
    if place_and_wake(line) then count = count + 1 end
  end
end
return count
