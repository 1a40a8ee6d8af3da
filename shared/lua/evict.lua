-- Keeps the transcripts within their byte budget: those past their retention leave the books, then
-- the ones that would end first are dropped. Their jobs answer "expired" from then on. Jobs past theirs
-- leave the lists.
-- ARGV  1 budget in bytes
-- returns  how many transcripts were dropped before their time
local now = now_ms()
local past = redis.call('ZRANGEBYSCORE', TRANSCRIPTS, '-inf', digits(now), 'LIMIT', 0, 1000)
for _, fp in ipairs(past) do drop_transcript(fp) end
unlist_expired(now, 1000)
local evicted = 0
while tonumber(redis.call('HGET', COUNTERS, 'transcript_bytes') or '0') > tonumber(ARGV[1]) do
  local fp = redis.call('ZRANGE', TRANSCRIPTS, 0, 0)[1]
  if not fp or evicted >= 1000 then break end
  drop_transcript(fp)
  evicted = evicted + 1
end
if evicted > 0 then count('transcripts_evicted', evicted) end
return evicted
