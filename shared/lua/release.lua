-- A worker gives a claim back unfinished: processing -> queued.
-- Without blame (a drain, a broken machine) the attempt is not counted, but hand-backs are limited;
-- with blame (the engine failed on this file) the attempt stays counted. Past either limit the
-- transcription fails with the given error.
-- ARGV  1 unit of work  2 claim id  3 blame (0 | 1)  4 limit  5 error code  6 error message
--       7 retention ms  8 grace ms
-- returns  {requeued} | {failed, holder ids} | {lost}
local unit = ARGV[1]
local now = now_ms()
if not owns(unit, ARGV[2], now) then return {'lost'} end
local spent
if ARGV[3] == '1' then
  spent = tonumber(redis.call('HGET', transcription(unit), 'attempts'))
else
  redis.call('HINCRBY', transcription(unit), 'attempts', -1)
  spent = redis.call('HINCRBY', transcription(unit), 'handbacks', 1)
end
if spent >= tonumber(ARGV[4]) then
  count('transcriptions_failed')
  local ids = end_transcription(parent_of(unit) or unit, now, 'failed', ARGV[5], ARGV[6],
    tonumber(ARGV[7]), tonumber(ARGV[8]))
  return {'failed', ids}
end
requeue(unit)
count('transcriptions_released')
return {'requeued'}
