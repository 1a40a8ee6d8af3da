-- Takes back what dead workers held. A transcription whose attempts are used up is quarantined.
-- ARGV  1 attempt limit  2 error code  3 error message  4 retention ms  5 grace ms
-- returns  {requeued count, queue length, holder ids of quarantined transcriptions}
local now = now_ms()
local requeued, ended = 0, {}
for _, fp in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', digits(now), 'LIMIT', 0, 100)) do
  if redis.call('HGET', transcription(fp), 'status') ~= 'processing' then
    redis.call('ZREM', LEASES, fp)
  elseif tonumber(redis.call('HGET', transcription(fp), 'attempts')) >= tonumber(ARGV[1]) then
    count('transcriptions_failed')
    for _, id in ipairs(end_transcription(fp, now, 'failed', ARGV[2], ARGV[3],
        tonumber(ARGV[4]), tonumber(ARGV[5]))) do
      table.insert(ended, id)
    end
  else
    requeue(fp)
    count('leases_expired')
    requeued = requeued + 1
  end
end
return {requeued, redis.call('ZCARD', QUEUE), ended}
