-- Looks at users whose queues somebody else has pushed to, and enters those with work into the ready-sets.
-- ARGV: '', then users
-- Reply: {how many of them became ready, how many of them were looked at}: one call looks at no more than holds nobody up, and the one of
--   them with whom the next call is to begin may have been looked at in part. Without the '' only the first number, for earlier programs
local MOST_LOOKED, MOST_MOVED = 100, 100
local tells_how_far = ARGV[1] == ''
local ready_now, looked_at = 0, 0
for at = tells_how_far and 2 or 1, #ARGV do
  local user = ARGV[at]
  local has_more = false
  if not is_user(user) then
    -- Bounded: what is left is found again by its key.
    try('SREM', K.queued_users(), user)
    for _ = 1, 100 do
      local id = try('RPOP', K.queue(user))
      if not id then break end
      this.looked = this.looked + 1
      set_aside(id, user, 'its queue belongs to no valid user name')
    end
  else
    local line = 'sql:' .. user
    if redis.call('TYPE', K.queue(user)).ok == 'list' then index(line) end
    -- Tasks that were pushed last need not wait for the SQL jobs before them: each goes to the line of its handler.
    local pushed = {}
    while true do
      local id = redis.pcall('LINDEX', K.queue(user), 0)
      if type(id) ~= 'string' or not is_id(id) or line_by_hash(id, user) == line then break end
      has_more = #pushed == MOST_MOVED
      if has_more then break end
      local verdict, moved = look(id, line)
      if verdict ~= 'moves' then break end
      redis.call('LPOP', K.queue(user))
      pushed[#pushed + 1] = {id, moved}
    end
    -- The one pushed first stands last here.
    for moving = #pushed, 1, -1 do move(pushed[moving][1], pushed[moving][2]) end
    if place_and_wake(line) then ready_now = ready_now + 1 end
  end
  if tells_how_far and has_more then break end
  looked_at = looked_at + 1
  if tells_how_far and this.looked >= MOST_LOOKED then break end
end
return tells_how_far and {ready_now, looked_at} or ready_now
