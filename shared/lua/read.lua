-- One job as its caller sees it, in one round trip.
-- ARGV  1 job id  2 who asks ('' sees all)
-- returns  {} if unknown, else {now ms, job fields, transcription fields, queue rank or -1,
--          1 if its transcript is there}
local fp = fingerprint_seen_by(ARGV[2], ARGV[1])
if not fp then return {} end
local record = redis.call('HGETALL', job(ARGV[1]))
local rank = redis.call('ZRANK', QUEUE, fp)
return {digits(now_ms()), record, redis.call('HGETALL', transcription(fp)), rank or -1,
  redis.call('EXISTS', transcript(fp))}
