-- Tells what limits users or pools, and whether it keeps them from their turn; changes nothing.
-- ARGV: 'user' or 'pool', names
-- Reply: for each {weight, concurrency, rate, period in ms, timeout in ms or user_limit, its pause or nil, jobs that run, starts
--   in the period that ends now, 'paused', 'concurrency', 'rate' or nil for what keeps it from its turn, until when in ms
--   since 1970 or nil, fields that are there and count for nothing}; nil for a limit that is not set
local kind = ARGV[1]
local OWN = kind == 'user' and 'timeout' or 'user_limit'
local NAMES = {'weight', 'concurrency', 'rate', 'period', OWN}

-- How many starts lie in the period that ends now. They stand in their order, the newest first.
local function starts_now(whose, own)
  local low, high = 0, own.rate and redis.call('LLEN', K.starts(whose)) or 0
  while low < high do
    local middle = math.floor((low + high) / 2)
    if tonumber(redis.call('LINDEX', K.starts(whose), middle)) + own.period > this.now_ms then low = middle + 1 else high = middle end
  end
  return low
end

local function text(number) return number and string.format('%.14g', number) or false end

local replies = {}
for i = 2, #ARGV do
  local name = ARGV[i]
  local key = kind == 'user' and K.limits(name) or K.pool(name)
  local whose, held, ignored = kind .. ':' .. name, redis.call('TYPE', key).ok, {}
  local said, running, why, until_ms, own = {}, nil, nil, nil, nil
  if held ~= 'hash' and held ~= 'none' then ignored[1] = 'all of them: the key holds a ' .. held end
  if #ignored == 0 then said = redis.call('HMGET', key, 'weight', 'concurrency', 'rate', 'period', OWN, 'paused') end
  if kind == 'user' then
    own, running = limits_of(name), tonumber(redis.call('HGET', K.active(), name) or 0)
    why, until_ms = user_kept_by(name, own)
  else
    own = #ignored == 0 and limits_of_pool(name) or limits_in()
    running = own.running or 0
    why, until_ms = kept_by(whose, own, running)
  end
  local counts = {said[1] and number_in(said[1], MIN_WEIGHT, MAX_WEIGHT), said[2] and number_in(said[2], 0, MAX_COUNT), own.rate,
    own.period, kind == 'user' and own.timeout or number_in(said[5], 0, MAX_COUNT)}
  for f, field in ipairs(NAMES) do
    if said[f] and said[f] ~= '' and not counts[f] then ignored[#ignored + 1] = field end
  end
  local reply = {}
  for f = 1, 5 do reply[f] = text(counts[f]) end
  reply[6] = own.paused and string.sub(said[6], 1, 1024) or false
  reply[7], reply[8], reply[9], reply[10], reply[11] = running, starts_now(whose, own), why or false, text(until_ms), ignored
  replies[#replies + 1] = reply
end
return replies
