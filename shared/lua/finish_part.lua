-- A part is transcribed. The last one sends the transcription back to the queue, to be joined; that
-- is the rest of its first attempt, not another.
-- ARGV  1 part  2 claim id  3 its segments (JSON)
-- returns  ok | lost (nothing was written)
local unit, now = ARGV[1], now_ms()
if not owns(unit, ARGV[2], now) then return 'lost' end
local fp = parent_of(unit)
redis.call('SET', transcript(unit), ARGV[3])
redis.call('ZREM', LEASES, unit)
set_progress(unit, '1')
learn_pace(unit, now)
redis.call('HSET', transcription(unit), 'status', 'completed')
redis.call('HDEL', transcription(unit), 'claim_id')
if redis.call('HINCRBY', transcription(fp), 'parts_left', -1) == 0 then
  redis.call('HSET', transcription(fp), 'stage', 'join')
  redis.call('HINCRBY', transcription(fp), 'attempts', -1)
  enqueue(QUEUE, fp)
end
tell(fp, 'moved')
return 'ok'
