-- Reads schedules. Changes nothing.
-- ARGV: names
-- Reply: for each name 'missing', {'unreadable', reason}, or 'schedule' and its fields and values in turn
local replies = {}
for i, name in ipairs(ARGV) do
  local key = K.schedule(name)
  local held = redis.call('TYPE', key).ok
  local bytes = held == 'hash' and try('MEMORY', 'USAGE', key, 'SAMPLES', '0') or 0
  if held == 'none' then
    replies[i] = 'missing'
  elseif held ~= 'hash' then
    replies[i] = {'unreadable', 'its key holds a ' .. held .. ', not a hash'}
  elseif bytes > 4 * MAX_PAYLOAD then
    replies[i] = {'unreadable', 'it is ' .. bytes .. ' bytes large'}
  else
    replies[i] = redis.call('HGETALL', key)
    table.insert(replies[i], 1, 'schedule')
  end
end
return replies
