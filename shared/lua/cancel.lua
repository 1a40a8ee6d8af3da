-- A caller gives up one job. The transcription stops only when no other job holds it.
-- ARGV  1 job id  2 who asks ('' sees all)  3 retention ms  4 grace ms  5 id of this call, which may
--       come again: a connection that breaks before the answer has it sent anew
-- returns  {outcome, the job's record, fingerprint of the transcription if that stopped, else ''}:
--          unknown | finished (nothing changed) | cancelled
local id = ARGV[1]
local retention_ms, grace_ms = tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()
local fp = fingerprint_seen_by(ARGV[2], id)
if not fp then return {'unknown', {}, ''} end
local ended, owner = end_job(id, now, 'cancelled', '', '', facts_of(fp), retention_ms, grace_ms)
if not ended then
  if redis.call('HGET', job(id), 'cancel_id') ~= ARGV[5] then return {'finished', {}, ''} end
  return {'cancelled', redis.call('HGETALL', job(id)), ''}
end
redis.call('HSET', job(id), 'cancel_id', ARGV[5])
count('jobs_cancelled')
redis.call('SREM', holders(fp), id)

-- Another job of its owner's that waits for the same pays for it at its end.
local function is_paid_later()
  for _, other in ipairs(redis.call('SMEMBERS', holders(fp))) do
    if redis.call('HGET', job(other), 'owner') == owner then return true end
  end
end

local plan, progress = unpack(redis.call('HMGET', transcription(fp), 'plan', 'progress'))
if owner and plan and not is_paid_later() then -- what was done of a long recording could be read
  charge(owner, cjson.decode(plan).duration * progress, now)
end
local is_last = redis.call('SCARD', holders(fp)) == 0
if is_last then
  end_transcription(fp, now, 'cancelled', '', '', retention_ms, grace_ms)
else
  tell(fp, 'ended', id)
end
return {'cancelled', redis.call('HGETALL', job(id)), is_last and fp or ''}
