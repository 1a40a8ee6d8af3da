-- A worker proves that a claim is alive, and reports how far it is.
-- ARGV  1 fingerprint  2 claim id  3 lease ms  4 progress 0-1
-- returns  ok | cancelled (nobody wants it any more) | lost (another claim may own it)
local fp = ARGV[1]
local now = now_ms()
if not owns(fp, ARGV[2], now) then
  return redis.call('HGET', transcription(fp), 'status') == 'cancelled' and 'cancelled' or 'lost'
end
redis.call('ZADD', LEASES, digits(now + ARGV[3]), fp)
redis.call('HSET', transcription(fp), 'progress', ARGV[4])
return 'ok'
