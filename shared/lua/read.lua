-- One job as its caller sees it, in one round trip.
-- ARGV  1 job id
-- returns  {} if unknown, else {now ms, job fields, transcription fields, queue rank or -1,
--          1 if its transcript is there}
local record = redis.call('HGETALL', job(ARGV[1]))
if #record == 0 then return {} end
local fp = redis.call('HGET', job(ARGV[1]), 'fingerprint')
local rank = redis.call('ZRANK', QUEUE, fp)
return {digits(now_ms()), record, redis.call('HGETALL', transcription(fp)), rank or -1,
  redis.call('EXISTS', transcript(fp))}
