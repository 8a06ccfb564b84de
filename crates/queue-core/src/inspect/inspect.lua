-- Reads fields of jobs; changes nothing. Sizes are asked before anything is read.
-- ARGV: number of fields, each field and the most bytes of it in turn, ids
-- Reply: for each id 'missing' (there is no hash), or {'claimed' or 'free', value of each field}, a value being a text, nil if
--   the field is absent, or its size as a number if it is larger than asked for
local n = tonumber(ARGV[1])
local replies = {}
for i = 2 + 2 * n, #ARGV do
  local job, reply = K.job(ARGV[i]), 'missing'
  if redis.call('TYPE', job).ok == 'hash' then
    reply = {try('HEXISTS', K.claims(), ARGV[i]) == 1 and 'claimed' or 'free'}
    for f = 2, 2 * n, 2 do
      local size = redis.call('HSTRLEN', job, ARGV[f])
      reply[#reply + 1] = size > tonumber(ARGV[f + 1]) and size or redis.call('HGET', job, ARGV[f])
    end
  end
  replies[#replies + 1] = reply
end
return replies
