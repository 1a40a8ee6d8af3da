-- A caller gives up one job. The transcription stops only when no other job holds it.
-- ARGV  1 job id  2 retention ms  3 grace ms
-- returns  unknown | finished (nothing changed) | cancelled
local id = ARGV[1]
local retention_ms, grace_ms = tonumber(ARGV[2]), tonumber(ARGV[3])
local now = now_ms()
local fp = redis.call('HGET', job(id), 'fingerprint')
if not fp then return 'unknown' end
if not end_job(id, now, 'cancelled', '', '', facts_of(fp), retention_ms, grace_ms) then
  return 'finished'
end
count('jobs_cancelled')
redis.call('SREM', holders(fp), id)
if redis.call('SCARD', holders(fp)) == 0 then
  end_transcription(fp, now, 'cancelled', '', '', retention_ms, grace_ms)
end
return 'cancelled'
