-- Looks at lines of tasks, and enters the users of those with work into the ready-sets.
-- ARGV: lines
-- Reply: how many of them became ready
local count = 0
for _, line in ipairs(ARGV) do
  local kind, user = parts_of(line)
  if not user or kind == 'sql' or not is_user(user) then
    redis.call('SREM', K.lines(), line)
  elseif place_and_wake(line) then
    count = count + 1
  end
end
return count
