-- Erases a finished job, and its transcript when no other live job holds it.
-- ARGV  1 job id
-- returns  unknown | unfinished (nothing changed) | erased
local id = ARGV[1]
local fp = redis.call('HGET', job(id), 'fingerprint')
if not fp then return 'unknown' end
if redis.call('HEXISTS', job(id), 'status') == 0 then return 'unfinished' end
redis.call('DEL', job(id))
redis.call('SREM', holders(fp), id)
for _, other in ipairs(redis.call('SMEMBERS', holders(fp))) do
  if redis.call('EXISTS', job(other)) == 1 then return 'erased' end
  redis.call('SREM', holders(fp), other)
end
if redis.call('HGET', transcription(fp), 'status') == 'completed' then
  drop_transcript(fp)
  redis.call('DEL', transcription(fp), holders(fp))
end
return 'erased'
