-- Takes back what dead workers held. A unit of work whose attempts are used up is quarantined: its
-- transcription fails. A lease can't end later than one that begins now, unless the clock was set
-- back: then it is cut to that.
-- ARGV  1 attempt limit  2 error code  3 error message  4 retention ms  5 grace ms  6 lease ms
-- returns  {requeued count, length of both queues, holder ids of quarantined transcriptions}
local now = now_ms()
local requeued, ended = 0, {}
for _, unit in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', digits(now), 'LIMIT', 0, 100)) do
  if redis.call('HGET', transcription(unit), 'status') ~= 'processing' then
    redis.call('ZREM', LEASES, unit)
  elseif tonumber(redis.call('HGET', transcription(unit), 'attempts')) >= tonumber(ARGV[1]) then
    count('transcriptions_failed')
    for _, id in ipairs(end_transcription(parent_of(unit) or unit, now, 'failed', ARGV[2], ARGV[3],
        tonumber(ARGV[4]), tonumber(ARGV[5]))) do
      table.insert(ended, id)
    end
  else
    requeue(unit)
    count('leases_expired')
    requeued = requeued + 1
  end
end
local longest = digits(now + ARGV[6])
for _, unit in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. longest, '+inf', 'LIMIT', 0, 100)) do
  redis.call('ZADD', LEASES, longest, unit)
end
return {requeued, redis.call('ZCARD', QUEUE) + redis.call('ZCARD', PARTS), ended}
