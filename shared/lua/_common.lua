-- Put before every script, after the key names of shared/keys.py.
-- Times are milliseconds (`_us`: microseconds) since 1970 from Redis's own clock, never from a caller.

local function now_us()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end

local function now_ms()
  return math.floor(now_us() / 1000)
end

-- Lua writes large numbers as 1.7e+12; Redis and Python want digits.
local function digits(number)
  return string.format('%.0f', number)
end

local function count(event, by)
  redis.call('HINCRBY', COUNTERS, event, by or 1)
end

-- A key without a lifetime gets this one; a longer lifetime stays.
local function live_at_least(key, ms)
  if redis.call('PTTL', key) < ms then redis.call('PEXPIRE', key, digits(ms)) end
end

-- A long recording runs in parts. A part is a unit of work as a transcription is, with its own status,
-- claim, lease and attempts, in a record of the same name: <fingerprint>#<number>.
local function part(fp, number)
  return string.format('%s#%04d', fp, number)
end

-- nil for a unit that is no part.
local function parent_of(unit)
  return string.match(unit, '^(.+)#%d+$')
end

-- Back to one unit: what the parts did is forgotten.
local function drop_parts(fp)
  for number = 0, tonumber(redis.call('HGET', transcription(fp), 'parts') or '0') - 1 do
    local unit = part(fp, number)
    redis.call('ZREM', PARTS, unit)
    redis.call('ZREM', LEASES, unit)
    redis.call('DEL', transcription(unit), transcript(unit))
  end
  redis.call('HDEL', transcription(fp), 'stage', 'plan', 'parts', 'parts_left')
end

-- How far a unit is, 0 to 1. A part moves its parent by its share of it.
local function set_progress(unit, progress)
  local parent = parent_of(unit)
  if parent then
    local fields = redis.call('HMGET', transcription(unit), 'progress', 'share')
    local step = (tonumber(progress) - tonumber(fields[1])) * tonumber(fields[2])
    redis.call('HINCRBYFLOAT', transcription(parent), 'progress', string.format('%.6f', step))
  end
  redis.call('HSET', transcription(unit), 'progress', progress)
end

-- What a job keeps of the run that ended it, so that a later run of the same file changes nothing.
local function facts_of(fp)
  local facts = {}
  for _, name in ipairs({'started_ms', 'attempts', 'duration', 'progress'}) do
    table.insert(facts, name)
    table.insert(facts, redis.call('HGET', transcription(fp), name) or '')
  end
  return facts
end

-- Gives one job its terminal status and its lifetime.
local function end_job(id, now, status, code, message, facts, retention_ms, grace_ms)
  if redis.call('EXISTS', job(id)) == 0 or redis.call('HEXISTS', job(id), 'status') == 1 then
    return false
  end
  redis.call('HSET', job(id), 'status', status, 'finished_ms', digits(now),
    'expires_ms', digits(now + retention_ms), 'error_code', code, 'error_message', message,
    unpack(facts))
  redis.call('PEXPIRE', job(id), digits(retention_ms + grace_ms))
  return true
end

-- Ends a transcription and every job that holds it. Returns the ids of those jobs.
local function end_transcription(fp, now, status, code, message, retention_ms, grace_ms)
  redis.call('ZREM', QUEUE, fp)
  redis.call('ZREM', LEASES, fp)
  redis.call('HSET', transcription(fp), 'status', status, 'finished_ms', digits(now))
  redis.call('HDEL', transcription(fp), 'claim_id')
  drop_parts(fp)
  live_at_least(transcription(fp), retention_ms + grace_ms)
  live_at_least(holders(fp), retention_ms + grace_ms)
  local ids, facts = redis.call('SMEMBERS', holders(fp)), facts_of(fp)
  for _, id in ipairs(ids) do
    if end_job(id, now, status, code, message, facts, retention_ms, grace_ms) then
      count('jobs_' .. status)
    end
  end
  return ids
end

-- Back to its queue, at the place that its age gives it.
local function requeue(unit)
  local parent = parent_of(unit)
  redis.call('ZREM', LEASES, unit)
  redis.call('HSET', transcription(unit), 'status', 'queued')
  redis.call('HDEL', transcription(unit), 'claim_id', 'worker')
  if redis.call('HGET', transcription(unit), 'stage') ~= 'join' then -- else its parts stay done
    set_progress(unit, '0')
    redis.call('HDEL', transcription(unit), 'started_ms')
  end
  local queued_us = redis.call('HGET', transcription(parent or unit), 'queued_us')
  redis.call('ZADD', parent and PARTS or QUEUE, queued_us, unit)
end

-- Removes a transcript and its place in the cache's books.
local function drop_transcript(fp)
  redis.call('DEL', transcript(fp))
  redis.call('ZREM', TRANSCRIPTS, fp)
  local size = redis.call('HGET', TRANSCRIPT_SIZES, fp)
  if size then
    redis.call('HDEL', TRANSCRIPT_SIZES, fp)
    count('transcript_bytes', -size)
  end
end

-- Keeps a transcript (and what leads to it) at least until `now + retention_ms`.
local function keep_transcript(fp, now, retention_ms, grace_ms)
  live_at_least(transcript(fp), retention_ms)
  live_at_least(transcription(fp), retention_ms + grace_ms)
  live_at_least(holders(fp), retention_ms + grace_ms)
  redis.call('ZADD', TRANSCRIPTS, 'GT', digits(now + retention_ms), fp)
end

-- True while this claim is the one that owns the unit and its lease has not ended.
local function owns(unit, claim_id, now)
  local lease = redis.call('ZSCORE', LEASES, unit)
  return lease and tonumber(lease) > now
    and redis.call('HGET', transcription(unit), 'claim_id') == claim_id
end
