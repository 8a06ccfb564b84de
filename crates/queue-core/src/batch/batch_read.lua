-- Reads blocks of a batch; changes nothing.
-- ARGV: id, 1 to have the rows or 0, 1 to have what became of them or 0, blocks
-- Reply: for each block {packed rows or '', first row of a chunk that has ended, its results, …}
local batch, replies = ARGV[1], {}
for i = 4, #ARGV do
  local block = ARGV[i]
  local reply = {ARGV[2] == '1' and redis.call('HGET', K.batch_rows(batch), block) or ''}
  local firsts = ARGV[3] == '1' and redis.call('HGET', K.batch_results(batch), block) or ''
  for first in string.gmatch(firsts, '%d+') do
    reply[#reply + 1] = first
    reply[#reply + 1] = redis.call('HGET', K.batch_results(batch), block .. ':' .. first) or ''
  end
  replies[#replies + 1] = reply
end
return replies
