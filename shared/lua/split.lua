-- A claimed transcription is long: from here on its parts are the units of work. It stays
-- processing, without a claim of its own, until the last part is done.
-- ARGV  1 fingerprint  2 claim id  3 plan (JSON)  4... each part's share of the work, 0 to 1
-- returns  ok | lost (nothing was written)
local fp = ARGV[1]
if not owns(fp, ARGV[2], now_ms()) then return 'lost' end
drop_parts(fp)
redis.call('ZREM', LEASES, fp)
redis.call('HDEL', transcription(fp), 'claim_id', 'worker')
redis.call('HSET', transcription(fp), 'stage', 'parts', 'plan', ARGV[3], 'progress', '0',
  'parts', #ARGV - 3, 'parts_left', #ARGV - 3)
local weight, line = unpack(redis.call('HMGET', transcription(fp), 'weight', 'line'))
for n = 4, #ARGV do
  local unit = part(fp, n - 4)
  redis.call('HSET', transcription(unit), 'status', 'queued', 'share', ARGV[n], 'attempts', '0',
    'handbacks', '0', 'progress', '0', 'weight', digits((weight or 0) * ARGV[n]))
  if line then line_up(PARTS, unit, line) end
  enqueue(PARTS, unit)
end
tell(fp, 'moved')
return 'ok'
