-- Makes a function of the library: what comes in with each call, before its own work and behind it.
-- KEYS: what our keys begin with
-- ARGV: the minor version that the caller needs, then the function's own
-- Reply: an error that begins with 'OLDER' where the library is older than that, and nothing was done
local function serve(name, flags, body)
  redis.register_function{function_name = name, flags = flags, callback = function(keys, args)
    local prefix, needed = keys[1] or '', args[1] or ''
    local is_ours = prefix == 'drayman:' or string.find(prefix, '^drayman:{[%w_-]+}:$')
    if #keys ~= 1 or not is_ours or #needed > 9 or not string.find(needed, '^%d+$') then
      return redis.error_reply('ERR ' .. name .. ' takes one key, what our keys begin with, and the minor version that is needed')
    end
    if tonumber(needed) > MINOR then return redis.error_reply('OLDER ' .. VERSION) end
    table.remove(args, 1)
    begin(prefix)
    local reply = body(args)
    this = nil
    return reply
  end}
end
