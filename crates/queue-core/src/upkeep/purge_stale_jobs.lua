-- Removes job hashes that nobody has touched for long and that are final or referenced by nothing.
-- ARGV: leader's session, term, for how many ms a hash must have been untouched, ids
-- Reply: the number removed, or 'not_leader'
-- The times in a hash are its producer's word, and a queue that names it may follow only now. So Redis' own memory of the
-- last access counts too.
local session, term, before = ARGV[1], ARGV[2], iso(this.now_ms - tonumber(ARGV[3]))
local least_idle_s = math.min(tonumber(ARGV[3]), MISSING_MS) / 1000
if not leads(session, term) then return 'not_leader' end
local removed = 0
for i = 4, #ARGV do
  local id = ARGV[i]
  local job = K.job(id)
  if redis.call('TYPE', job).ok == 'hash' and (try('OBJECT', 'IDLETIME', job) or 0) >= least_idle_s then
    local h = redis.call('HMGET', job, 'updated_at', 'created_at', 'status', 'fallback_status', 'user')
    local touched = h[1] or h[2] or ''
    -- ISO times compare as texts; what is no time at all is left alone.
    local old = string.match(touched, '^%d%d%d%d%-%d%d%-%d%dT') and touched < before
    if old and redis.call('HEXISTS', K.claims(), id) == 0 then
      -- Without a user nobody can say which queue it may stand in, and a long queue is not searched.
      local queue = h[5] and h[5] ~= '' and queue_of(line_by_hash(id, h[5]), band_of(id))
      local referenced = not queue or redis.call('ZSCORE', K.due(), id) or (try('LLEN', queue) or 0) > 1000
        or try('LPOS', queue, id)
        -- A batch whose rows are all dealt stands nowhere. One that was held for so long is nobody's. A flow never stands anywhere.
        or (is_batch(id) and h[3] ~= 'held') or is_flow(id)
      if is_over(h[3], h[4]) or not referenced then
        give_up_unique(id, 'queued', 'done')
        remove_record(id)
        forget({id})
        removed = removed + 1
      end
    end
  end
end
return removed
