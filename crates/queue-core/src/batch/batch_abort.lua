-- Aborts a batch.
-- ARGV: id, retention in ms
-- Reply: {'aborted'}, {'over', status} (it had ended, or was aborted before), or 'missing'
local job = K.job(ARGV[1])
if redis.call('TYPE', job).ok ~= 'hash' or not is_batch(ARGV[1]) then return 'missing' end
return abort_batch(ARGV[1], tonumber(ARGV[2]))
