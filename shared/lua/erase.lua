-- Erases a finished job, and its transcript when no other live job holds it.
-- ARGV  1 job id  2 who asks ('' sees all)
-- returns  {outcome, the job's record as it was}: unknown | unfinished (nothing changed) | erased
local id = ARGV[1]
local fp = fingerprint_seen_by(ARGV[2], id)
if not fp then return {'unknown', {}} end
if redis.call('HEXISTS', job(id), 'status') == 0 then return {'unfinished', {}} end
local erased = {'erased', redis.call('HGETALL', job(id))}
redis.call('DEL', job(id))
redis.call('SREM', holders(fp), id)
local other = redis.call('SRANDMEMBER', holders(fp)) -- one at a time: there may be very many
while other do
  if redis.call('EXISTS', job(other)) == 1 then return erased end
  redis.call('SREM', holders(fp), other)
  other = redis.call('SRANDMEMBER', holders(fp))
end
if redis.call('HGET', transcription(fp), 'status') == 'completed' then
  drop_transcript(fp)
  redis.call('DEL', transcription(fp), holders(fp))
end
return erased
