-- The one table of what is kept while a call runs, and the clock by which it runs. No other state outlives a line of a module: so no call
-- meets what another has left behind, however that ended.
-- prefix     what our keys begin with
-- now_us     the server's time in µs since 1970, and now_ms in ms
-- services   the services that were taken apart in this call
-- moves      the lines to which ids have moved from others, for `place` to see to
-- missed     how many ids without a hash were met
-- looked     how many ids of lines were looked at
-- moved_on   what is written at the end: the virtual times of pools, and the greatest turn
-- comparing  what a comparison of keys has found (look.lua)
-- suspects   the jobs that sessions run as suspects; `cancelling`, whether they are asked to cancel any
local this

local function begin(prefix)
  local clock = redis.call('TIME')
  local now_us = clock[1] * 1000000 + clock[2]
  this = {prefix = prefix, now_us = now_us, now_ms = math.floor(now_us / 1000), services = {}, moves = {}, missed = 0, looked = 0,
    moved_on = {v = {}, turn = 0}, suspects = {}, cancelling = {}}
end

-- Puts values at the end of a list.
local function append(list, ...)
  for _, value in ipairs({...}) do list[#list + 1] = value end
end

-- Whole numbers beyond 10^14 lose digits in Lua's own conversion.
local function int(x) return string.format('%.0f', x) end

-- How many arguments follow, as the caller says it. What is no count would let a loop over them stand still.
local function count_in(text)
  if #(text or '') > 9 or not string.find(text or '', '^%d+$') then
    error('an argument that says how many follow is no count: ' .. string.sub(text or 'nothing', 1, 40), 0)
  end
  return tonumber(text)
end

-- ISO 8601 in UTC with milliseconds, the form in which the hash of a job keeps times.
local function iso(ms)
  local days = math.floor(ms / 86400000)
  local rest = ms - days * 86400000
  -- Days since 1970 to a date, counted in 400-year eras that begin on 1 March.
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  return string.format('%04d-%02d-%02dT%02d:%02d:%02d.%03dZ', year, month, day, math.floor(rest / 3600000),
    math.floor(rest / 60000) % 60, math.floor(rest / 1000) % 60, rest % 1000)
end

-- The time of this call in that form.
local function now()
  this.now = this.now or iso(this.now_ms)
  return this.now
end
