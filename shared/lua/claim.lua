-- A worker takes the transcription that should run next: queued -> processing.
-- This is the one place that decides the order of work: the oldest first.
-- ARGV  1 claim id  2 worker id  3 lease ms
-- returns  {} if nothing is queued, else {fingerprint, transcription fields, up to 20 holder ids}
local now = now_ms()
while true do
  local fp = redis.call('ZRANGE', QUEUE, 0, 0)[1]
  if not fp then return {} end
  redis.call('ZREM', QUEUE, fp)
  if redis.call('HGET', transcription(fp), 'status') == 'queued' then
    redis.call('HSET', transcription(fp), 'status', 'processing', 'claim_id', ARGV[1],
      'worker', ARGV[2], 'started_ms', digits(now))
    redis.call('HINCRBY', transcription(fp), 'attempts', 1)
    redis.call('ZADD', LEASES, digits(now + ARGV[3]), fp)
    local some = redis.call('SRANDMEMBER', holders(fp), 20)
    return {fp, redis.call('HGETALL', transcription(fp)), some}
  end
end
