-- Erases a finished job with all that is known of it, and its transcription when no other live job
-- holds it.
-- ARGV  1 job id  2 who asks ('' sees all)
-- returns  {outcome, the job's record as it was}: unknown | unfinished (nothing changed) | erased
local TOMBSTONE_MS = 60000
local id = ARGV[1]
local fp = fingerprint_seen_by(ARGV[2], id)
if not fp then return {'unknown', {}} end
local ended, owner, of_batch, number, key, url = unpack(redis.call('HMGET', job(id), 'status', 'owner',
  'batch', 'batch_number', 'idempotency', 'webhook_url'))
if not ended then return {'unfinished', {}} end
local erased = {'erased', redis.call('HGETALL', job(id))}
if url then stop_delivery(receiver_of(url), id) end
redis.call('DEL', job(id), delivery(id))
unlist(listed_as(id, owner, of_batch))
if key then forget_key(idempotency(key), number or '0', id) end
redis.call('SREM', holders(fp), id)
local other = redis.call('SRANDMEMBER', holders(fp)) -- one at a time: there may be very many
while other do
  if not is_gone(other, now_ms()) then return erased end
  redis.call('SREM', holders(fp), other)
  other = redis.call('SRANDMEMBER', holders(fp))
end
local status = redis.call('HGET', transcription(fp), 'status')
if status == 'completed' or status == 'failed' or status == 'cancelled' then
  drop_transcript(fp)
  redis.call('DEL', transcription(fp), holders(fp))
end
if status == 'cancelled' then -- who still works on it is to know why it ended
  redis.call('HSET', transcription(fp), 'status', status)
  redis.call('PEXPIRE', transcription(fp), TOMBSTONE_MS)
end
return erased
