-- Lets the lock of a tracked job live on. One that has expired and that nobody has taken is still its holder's.
-- ARGV: tracker, id, lock, fence, how long it lives from now in ms
-- Reply: 'held', or 'lost' (the lock is another's or nobody's: nothing was written)
local tracker, id, lock, fence, expire_ms = ARGV[1], ARGV[2], ARGV[3], ARGV[4], tonumber(ARGV[5])
local r = look_at(tracker, id)
if not r or int(r.fence) ~= fence or r.lock ~= lock then return 'lost' end
local fault = wrong_type(tracker, id)
if fault then return fault end
lock_for(tracker, id, expire_ms)
return 'held'
