-- A job enters: joins a transcription that is done or in flight, or creates and queues one.
-- Idempotent on the job id, so a manifest can be resubmitted any number of times; and on the key of its
-- owner's request, if it has one (`idempotency`): the same request enters once, another is refused.
-- ARGV  1 job id  2 fingerprint  3 checksum  4 options (JSON)  5 model  6 bytes of the upload
--       7 owner ('' if nobody has a name)  8 retention ms  9 grace ms
--       10 the most weight that may go before it  11, 12 the most jobs and the most audio (ms) of
--       the owner: limit_reached(). '' is no limit
--       13 the least that must be there: hit (a transcript) | joined (or one in flight) | '' (nothing)
--       | failed (the job itself, failed, and retried one time less than `retries` says: it enters again)
--       14... names and values that the job's record keeps, in turn (Manifest.told)
-- returns  {outcome, id, number}: outcome is new | joined | hit | exists, or (nothing was written)
--          replayed | conflict | unknown | gone | not_failed | full | jobs | audio; id is that of
--          another job that holds the same input ('' if none), or of the job that entered with the
--          same key; number, for full: the weight that would go before it; for jobs and audio: ms, as
--          limit_reached()
local LEAST_WEIGHT = 65536 -- the shortest clip costs as much as 30 s of audio
local id, fp, owner = ARGV[1], ARGV[2], ARGV[7]
local retention_ms, grace_ms = tonumber(ARGV[8]), tonumber(ARGV[9])
local most_weight = tonumber(ARGV[10])
local now = now_ms()
local told = {}
for n = 14, #ARGV, 2 do told[ARGV[n]] = ARGV[n + 1] end
local is_retry = ARGV[13] == 'failed'
if is_retry then
  if is_gone(id, now) then return {'gone', ''} end
  local status, retries = unpack(redis.call('HMGET', job(id), 'status', 'retries'))
  if status ~= 'failed' or tonumber(retries or '0') + 1 ~= tonumber(told.retries) then
    return {'not_failed', ''}
  end
elseif redis.call('EXISTS', job(id)) == 1 then
  return {'exists', ''}
end

local key, number = told.idempotency and idempotency(told.idempotency), told.batch_number or '0'
if key then
  local request, of_batch, first = unpack(redis.call('HMGET', key, 'request', 'batch', number))
  if request and request ~= told.request then return {'conflict', ''} end
  if first and first ~= id and not is_gone(first, now) then return {'replayed', first} end
  told.batch = of_batch or told.batch
end

local outcome = found(fp, ARGV[5])
if (ARGV[13] == 'hit' and outcome ~= 'hit') or (ARGV[13] == 'joined' and outcome == 'new') then
  return {'unknown', ''}
end

if outcome ~= 'hit' and owner ~= '' then
  local limit, ms = limit_reached(owner, tonumber(ARGV[11]), tonumber(ARGV[12]), now)
  if limit then return {limit, '', ms} end
end
if redis.call('ZCARD', QUEUE) + redis.call('ZCARD', PARTS) + redis.call('ZCARD', LEASES) == 0 then
  rest()
end
if outcome == 'new' and most_weight then
  local before = weight_before(owner)
  if before > most_weight then return {'full', '', before} end
end

if is_retry then forget_end(id) end
local leader = outcome == 'joined' and redis.call('SRANDMEMBER', holders(fp)) or ''
redis.call('HSET', job(id), 'fingerprint', fp, 'submitted_ms', digits(now), 'outcome', outcome)
for name, value in pairs(told) do redis.call('HSET', job(id), name, value) end
if owner ~= '' then
  redis.call('HSET', job(id), 'owner', owner)
  if outcome ~= 'hit' then hold(owner, id, ARGV[6]) end
end
unlist_expired(now, 2)
list_job(id, owner, told.batch, number)
if key then
  redis.call('HSET', key, 'request', told.request, number, id)
  if told.batch then redis.call('HSET', key, 'batch', told.batch) end
  redis.call('HINCRBY', key, 'unfinished', 1)
  redis.call('PERSIST', key)
end
count('jobs_submitted')
count('submit_' .. outcome)

if outcome == 'new' then
  redis.call('DEL', transcription(fp), holders(fp))
  drop_transcript(fp)
  redis.call('HSET', transcription(fp), 'status', 'queued', 'checksum', ARGV[3], 'options', ARGV[4],
    'model', ARGV[5], 'queued_us', digits(now_us()), 'attempts', '0', 'handbacks', '0',
    'progress', '0', 'weight', digits(math.max(LEAST_WEIGHT, tonumber(ARGV[6]))),
    'priority', told.priority or 'normal')
  line_up(QUEUE, fp, line_of(owner, told.priority))
  enqueue(QUEUE, fp)
elseif outcome == 'joined' then
  lift(fp, owner, told.priority)
end
redis.call('SADD', holders(fp), id)
if outcome == 'hit' then
  end_job(id, now, 'completed', '', '', facts_of(fp), retention_ms, grace_ms)
  count('jobs_completed')
  keep_transcript(fp, now, retention_ms, grace_ms)
end
tell(fp, outcome == 'hit' and 'ended' or 'moved', id) -- a job that was lost may be waited for
return {outcome, leader}
