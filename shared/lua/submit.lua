-- A job enters: joins a transcription that is done or in flight, or creates and queues one.
-- Idempotent on the job id, so a manifest can be resubmitted any number of times.
-- ARGV  1 job id  2 fingerprint  3 checksum  4 options (JSON)  5 model  6 retention ms  7 grace ms
-- returns  {outcome, leader}: outcome is new | joined | hit | exists; leader is the id of another
--          job that holds the same input ('' if none)
local id, fp = ARGV[1], ARGV[2]
local retention_ms, grace_ms = tonumber(ARGV[6]), tonumber(ARGV[7])
local now = now_ms()
if redis.call('EXISTS', job(id)) == 1 then return {'exists', ''} end

local status = redis.call('HGET', transcription(fp), 'status')
local outcome = 'new'
if status == 'queued' or status == 'processing' then
  outcome = 'joined'
elseif status == 'completed' and redis.call('EXISTS', transcript(fp)) == 1
    and redis.call('HGET', transcription(fp), 'model') == ARGV[5] then
  outcome = 'hit'
end

local leader = outcome == 'joined' and redis.call('SRANDMEMBER', holders(fp)) or ''
redis.call('HSET', job(id), 'fingerprint', fp, 'submitted_ms', digits(now), 'outcome', outcome)
count('jobs_submitted')
count('submit_' .. outcome)

if outcome == 'new' then
  redis.call('DEL', transcription(fp), holders(fp))
  drop_transcript(fp)
  local queued_us = digits(now_us())
  redis.call('HSET', transcription(fp), 'status', 'queued', 'checksum', ARGV[3], 'options', ARGV[4],
    'model', ARGV[5], 'queued_us', queued_us, 'attempts', '0', 'handbacks', '0', 'progress', '0')
  redis.call('ZADD', QUEUE, queued_us, fp)
end
redis.call('SADD', holders(fp), id)
if outcome == 'hit' then
  end_job(id, now, 'completed', '', '', facts_of(fp), retention_ms, grace_ms)
  count('jobs_completed')
  keep_transcript(fp, now, retention_ms, grace_ms)
end
return {outcome, leader}
