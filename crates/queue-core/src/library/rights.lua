-- Tells what the caller may not do though a function may need it, since functions run under the caller's own rights: one that is refused a
-- command half-way has written what came before.
-- ARGV: for each key that is asked about how many commands, the key, the commands
-- Reply: for each that is refused the command and the key, in turn
local refused = {}
local i = 1
while i <= #ARGV do
  local count, key = count_in(ARGV[i]), ARGV[i + 1]
  for at = i + 2, i + 1 + count do
    -- Whichever argument is a key, it is this one.
    if not redis.acl_check_cmd(ARGV[at], key, key, key, key) then
      refused[#refused + 1] = ARGV[at]
      refused[#refused + 1] = key
    end
  end
  i = i + 2 + count
end
return refused
