-- A claim ends with a transcript or a permanent failure: processing -> completed | failed. A part of a
-- long recording can only fail, and then all of the recording has.
-- ARGV  1 unit of work  2 claim id  3 completed | failed  4 transcript (JSON)  5 model that was used
--       6 audio seconds  7 error code  8 error message  9 retention ms  10 grace ms
-- returns  {ok, holder ids} or {lost}: then nothing was written
local fp, status = parent_of(ARGV[1]) or ARGV[1], ARGV[3]
local retention_ms, grace_ms = tonumber(ARGV[9]), tonumber(ARGV[10])
local now = now_ms()
if not owns(ARGV[1], ARGV[2], now) then return {'lost'} end
redis.call('HSET', transcription(fp), 'duration', ARGV[6], 'model', ARGV[5])
if status == 'completed' then
  if redis.call('HEXISTS', transcription(fp), 'stage') == 0 then learn_pace(fp, now) end
  redis.call('SET', transcript(fp), ARGV[4])
  redis.call('HSET', transcription(fp), 'progress', '1')
  redis.call('HSET', TRANSCRIPT_SIZES, fp, #ARGV[4])
  count('transcript_bytes', #ARGV[4])
  keep_transcript(fp, now, retention_ms, grace_ms)
end
count('transcriptions_' .. status)
local ids = end_transcription(fp, now, status, ARGV[7], ARGV[8], retention_ms, grace_ms)
return {'ok', ids}
