-- What a part needs is gone from the disk: the whole recording is planned anew.
-- ARGV  1 part, or transcription whose parts are done  2 claim id  3 limit of hand-backs
--       4 error code  5 error message  6 retention ms  7 grace ms
-- returns  {requeued} | {failed, holder ids} | {lost}
local now = now_ms()
if not owns(ARGV[1], ARGV[2], now) then return {'lost'} end
local fp = parent_of(ARGV[1]) or ARGV[1]
if redis.call('HINCRBY', transcription(fp), 'handbacks', 1) >= tonumber(ARGV[3]) then
  count('transcriptions_failed')
  return {'failed', end_transcription(fp, now, 'failed', ARGV[4], ARGV[5],
    tonumber(ARGV[6]), tonumber(ARGV[7]))}
end
drop_parts(fp)
redis.call('HSET', transcription(fp), 'attempts', '0')
requeue(fp)
count('transcriptions_released')
return {'requeued'}
