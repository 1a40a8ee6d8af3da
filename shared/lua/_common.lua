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

-- What a unit is expected to cost, in bytes of its upload: all that is known before it is decoded.
-- Joining parts costs nearly nothing.
local function weight_of(unit)
  local weight, stage = unpack(redis.call('HMGET', transcription(unit), 'weight', 'stage'))
  return stage ~= 'join' and tonumber(weight or '0') or 0
end

-- Who goes first (docs/adr/0024): what a caller sends with one priority is a line, and each queue has
-- a clock that runs in weight. A unit starts where the one before it in its line ends, or now; the
-- earliest start is the next. So callers whose work waits get even shares, and who has none is next.
local CLOCK = {[QUEUE] = 'clock', [PARTS] = 'parts_clock'}
local LINE_MS = 30 * 86400000 -- a line that nobody used for so long is forgotten
local TAKEN = 'taken' -- in a line: where what was taken of it ends, and nothing of what that was

-- A priority is a head start: its units count as starting so much work earlier, here 1,000 hours of
-- plain speech. So whatever waits is never passed by what starts later than that.
local HEAD_START = {high = 1000 * 3600 * 32000, low = -1000 * 3600 * 32000}

local function head_start(priority)
  return HEAD_START[priority] or 0
end

local function line_of(owner, priority)
  return (priority or 'normal') .. '/' .. owner
end

local function priority_and_owner(line)
  return string.match(line, '^(%a+)/(.*)$')
end

local function members(queue, line)
  return lines((queue == PARTS and 'parts/' or 'queue/') .. line)
end

-- The latest start of what was taken. At first it is the time of day (us), which was the place of what
-- an older version queued: that is older, and goes first.
local function clock(queue)
  return tonumber(redis.call('HGET', COUNTERS, CLOCK[queue]) or now_us())
end

-- While some of a priority waits, it has a clock of its own, which stands when others are taken: they
-- would carry the clock past all that waits, and who comes then would stand behind it.
local function own_clock(queue, line)
  return CLOCK[queue] .. '_' .. (priority_and_owner(line))
end

local function clock_of(queue, line)
  local own = own_clock(queue, line)
  local time, waiting = unpack(redis.call('HMGET', COUNTERS, own, own .. '_waiting'))
  if not time or tonumber(waiting or '0') <= 0 then return clock(queue) end
  return tonumber(time)
end

-- A tick after what starts already: at one place the first to come goes first.
local function next_start(queue, line)
  local last = redis.call('ZRANGE', members(queue, line), -1, -1, 'WITHSCORES')[2]
  return math.max(clock_of(queue, line) + 1, tonumber(last or '0'))
end

-- To the end of a line.
local function line_up(queue, unit, line)
  local start, now = next_start(queue, line), clock_of(queue, line) + 1
  redis.call('HSET', COUNTERS, own_clock(queue, line), digits(now),
    CLOCK[queue], digits(math.max(clock(queue), now)))
  redis.call('HSET', transcription(unit), 'line', line, 'start', digits(start))
end

-- The line that a unit is in, where it starts and where it ends; nil for what an older version queued.
local function stretch_of(unit)
  local line, start, weight = unpack(
    redis.call('HMGET', transcription(unit), 'line', 'start', 'weight'))
  if line then return line, tonumber(start), start + (weight or 0) end
end

-- Where a unit stands in its queue.
local function place_of(unit)
  local line, start = stretch_of(unit)
  if line then return start - head_start((priority_and_owner(line))) end
  local queued_us, priority = unpack(
    redis.call('HMGET', transcription(parent_of(unit) or unit), 'queued_us', 'priority'))
  return queued_us - head_start(priority)
end

-- What waits, in the counter `backlog`; and for each caller in BACKLOGS.
local function weigh(unit, sign)
  local weight, line = weight_of(unit), redis.call('HGET', transcription(unit), 'line')
  if weight == 0 then return end
  weight = sign * weight
  count('backlog', weight)
  if not line then return end
  local _, owner = priority_and_owner(line)
  if tonumber(redis.call('ZINCRBY', BACKLOGS, weight, owner)) <= 0 then
    redis.call('ZREM', BACKLOGS, owner)
  end
end

-- How much goes before what this caller would send now, at most: as much of each caller whose work
-- waits as of its own.
local function weight_before(owner)
  local all = tonumber(redis.call('HGET', COUNTERS, 'backlog') or '0')
  local own = tonumber(redis.call('ZSCORE', BACKLOGS, owner) or '0')
  return math.min(all, own * redis.call('ZCARD', BACKLOGS))
end

-- Into QUEUE or PARTS, at its place, and out of it.
local function enqueue(queue, unit)
  local line, _, ends = stretch_of(unit)
  if redis.call('ZADD', queue, digits(place_of(unit)), unit) == 1 then
    weigh(unit, 1)
    if line then count(own_clock(queue, line) .. '_waiting') end
  end
  if line then
    redis.call('ZADD', members(queue, line), digits(ends), unit)
    redis.call('PEXPIRE', members(queue, line), digits(LINE_MS))
  end
  if queue == QUEUE then
    redis.call('ZADD', WAITING, redis.call('HGET', transcription(unit), 'queued_us'), unit)
  end
end

-- Returns whether it was there.
local function dequeue(queue, unit)
  local line, was_there = stretch_of(unit), redis.call('ZREM', queue, unit) == 1
  if was_there then
    weigh(unit, -1)
    if line then count(own_clock(queue, line) .. '_waiting', -1) end
  end
  if queue == QUEUE then redis.call('ZREM', WAITING, unit) end
  if line then redis.call('ZREM', members(queue, line), unit) end
  return was_there
end

-- A worker takes it: the clock is where it starts, and its caller is charged for it.
local function take(queue, unit)
  dequeue(queue, unit)
  local line, start, ends = stretch_of(unit)
  if not line then return end
  local own, field = own_clock(queue, line), CLOCK[queue] .. '_ends'
  local now = math.max(start, tonumber(redis.call('HGET', COUNTERS, own) or '0'))
  local latest = math.max(ends, tonumber(redis.call('HGET', COUNTERS, field) or '0'))
  redis.call('HSET', COUNTERS, own, digits(now), CLOCK[queue], digits(math.max(clock(queue), now)),
    field, digits(latest))
  redis.call('ZADD', members(queue, line), 'GT', digits(ends), TAKEN)
  redis.call('PEXPIRE', members(queue, line), digits(LINE_MS))
  redis.call('ZREMRANGEBYSCORE', members(queue, line), '-inf', digits(now))
end

-- Nothing waits: nobody has more waiting than others, or had.
local function rest()
  redis.call('HDEL', COUNTERS, 'backlog')
  redis.call('DEL', BACKLOGS)
  for queue, name in pairs(CLOCK) do
    local latest = tonumber(redis.call('HGET', COUNTERS, name .. '_ends') or '0')
    redis.call('HSET', COUNTERS, name, digits(math.max(clock(queue), latest)))
    for _, priority in ipairs({'high', 'normal', 'low'}) do
      local own = name .. '_' .. priority
      redis.call('HDEL', COUNTERS, own, own .. '_waiting')
    end
  end
end

-- Somebody joins: a unit goes to the end of the joining line, if it stands earlier there.
local function move_up(queue, unit, line)
  local known, status = unpack(redis.call('HMGET', transcription(unit), 'line', 'status'))
  local place = next_start(queue, line) - head_start((priority_and_owner(line)))
  if known == line or status == 'completed' or place >= place_of(unit) then return end
  local waits = dequeue(queue, unit)
  line_up(queue, unit, line)
  if waits then enqueue(queue, unit) end
end

local function lift(fp, owner, priority)
  local known, parts = unpack(redis.call('HMGET', transcription(fp), 'priority', 'parts'))
  if head_start(priority) > head_start(known) then
    redis.call('HSET', transcription(fp), 'priority', priority or 'normal')
  end
  move_up(QUEUE, fp, line_of(owner, priority))
  for number = 0, tonumber(parts or '0') - 1 do
    move_up(PARTS, part(fp, number), line_of(owner, priority))
  end
end

-- Learns from a unit that is completed how long a slot takes for its weight. What is older counts
-- less and less: half after 14 units.
local function learn_pace(unit, now)
  local weight, started = unpack(redis.call('HMGET', transcription(unit), 'weight', 'started_ms'))
  if not weight or not started then return end
  local known = redis.call('HMGET', PACE, 'weight', 'ms')
  redis.call('HSET', PACE, 'weight', digits(tonumber(known[1] or '0') * 0.95 + weight),
    'ms', digits(tonumber(known[2] or '0') * 0.95 + math.max(1, now - started)))
end

-- Back to one unit: what the parts did is forgotten.
local function drop_parts(fp)
  for number = 0, tonumber(redis.call('HGET', transcription(fp), 'parts') or '0') - 1 do
    local unit = part(fp, number)
    dequeue(PARTS, unit)
    redis.call('ZREM', LEASES, unit)
    redis.call('DEL', transcription(unit), transcript(unit))
  end
  redis.call('HDEL', transcription(fp), 'stage', 'plan', 'parts', 'parts_left')
end

-- What a submission finds: a transcript of this model (hit), a transcription in flight (joined) or
-- neither of them (new).
local function found(fp, model)
  local status, of_model = unpack(redis.call('HMGET', transcription(fp), 'status', 'model'))
  if status == 'queued' or status == 'processing' then return 'joined' end
  local is_hit = status == 'completed' and of_model == model
    and redis.call('EXISTS', transcript(fp)) == 1
  return is_hit and 'hit' or 'new'
end

-- Whoever waits for a transcription, or for one job that holds it, reads it anew: it has moved, or
-- ended. Nobody is told what became of it: this is a bell, too.
local function tell(fp, what, id)
  redis.call('PUBLISH', changes(fp), id and what .. ' ' .. id or what)
end

-- How far a unit is, 0 to 1. A part moves its parent by its share of it. Returns whether it moved.
local function set_progress(unit, progress)
  local parent = parent_of(unit)
  local fields = redis.call('HMGET', transcription(unit), 'progress', 'share')
  local step = tonumber(progress) - tonumber(fields[1])
  if parent then
    redis.call('HINCRBYFLOAT', transcription(parent), 'progress',
      string.format('%.6f', step * tonumber(fields[2])))
  end
  redis.call('HSET', transcription(unit), 'progress', progress)
  return step ~= 0
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

-- Whose jobs a caller sees: those of its own name; '' sees all. What it doesn't see is not there.
local function fingerprint_seen_by(name, id)
  local fp, owner = unpack(redis.call('HMGET', job(id), 'fingerprint', 'owner'))
  return (name == '' or name == owner) and fp
end

-- One job as who asks sees it, nil where it is not there: {now ms, job fields, transcription fields,
-- queue rank or -1, 1 if its transcript is there}
local function seen_job(name, id)
  local fp = fingerprint_seen_by(name, id)
  if not fp then return end
  local names, work = {'status', 'started_ms', 'attempts', 'duration', 'progress', 'parts',
    'parts_left'}, {}
  for n, value in ipairs(redis.call('HMGET', transcription(fp), unpack(names))) do
    table.insert(work, names[n])
    table.insert(work, value or '')
  end
  return {digits(now_ms()), redis.call('HGETALL', job(id)), work,
    redis.call('ZRANK', QUEUE, fp) or -1, redis.call('EXISTS', transcript(fp))}
end

-- Nothing can be had of this job any more: it is unknown, past its retention, or its transcript was
-- dropped to make room.
local function is_gone(id, now)
  local fp, status, expires_ms = unpack(redis.call('HMGET', job(id), 'fingerprint', 'status',
    'expires_ms'))
  if not fp or (expires_ms and tonumber(expires_ms) <= now) then return true end
  return status == 'completed' and redis.call('EXISTS', transcript(fp)) == 0
end

-- Every job stands in the list of its owner, the newest last, and in that of its batch if it has one.
local function list_job(id, owner, of_batch, number)
  local newest = redis.call('ZRANGE', jobs(owner), -1, -1, 'WITHSCORES')[2] or 0
  redis.call('ZADD', jobs(owner), digits(math.max(now_us(), newest + 1)), id) -- no two at one place
  if of_batch then redis.call('ZADD', batch(of_batch), number, id) end
end

local function listed_as(id, owner, of_batch)
  return string.format('%s/%s/%s', id, of_batch or '', owner or '')
end

local function unlist(listed)
  local id, of_batch, owner = string.match(listed, '^(.-)/(.-)/(.*)$')
  redis.call('ZREM', jobs(owner), id)
  redis.call('ZREM', batch(of_batch), id)
  redis.call('ZREM', LISTED, listed)
end

-- Whose retention is past. Every submission makes room for itself, the reaper does the rest.
local function unlist_expired(now, most)
  for _, listed in ipairs(redis.call('ZRANGEBYSCORE', LISTED, '-inf', digits(now), 'LIMIT', 0, most)) do
    unlist(listed)
  end
end

-- One job leaves the jobs of an Idempotency-Key, which is forgotten with the last of them.
local function forget_key(key, number, id)
  if redis.call('HGET', key, number) ~= id then return end
  redis.call('HDEL', key, number)
  for _, name in ipairs(redis.call('HKEYS', key)) do
    if string.match(name, '^%d+$') then return end
  end
  redis.call('DEL', key)
end

-- What a named caller has in hand: its unfinished jobs, and the audio that is held for each until it
-- is known. A job's upload holds what it would be as plain speech (16 kHz, 16 bit).
local function hold(name, id, bytes)
  local ms = math.ceil(bytes / 32)
  redis.call('HSET', unfinished(name), id, ms)
  redis.call('INCRBY', held(name), ms)
end

local function let_go(name, id)
  local ms = redis.call('HGET', unfinished(name), id)
  if not ms then return end
  redis.call('HDEL', unfinished(name), id)
  if redis.call('EXISTS', unfinished(name)) == 0 then
    redis.call('DEL', held(name))
  else
    redis.call('DECRBY', held(name), ms)
  end
end

local function midnight_after(now)
  return (math.floor(now / 86400000) + 1) * 86400000
end

local function charge(name, seconds, now)
  redis.call('INCRBY', audio_used(name), math.ceil(seconds * 1000))
  redis.call('PEXPIREAT', audio_used(name), digits(midnight_after(now)))
end

-- May this caller submit? nil: yes. Else which limit is reached, jobs or audio, and in how many ms it
-- will not be; 0: when one of its jobs ends. A limit of nil is none.
local function limit_reached(name, most_jobs, most_audio_ms, now)
  if most_jobs and redis.call('HLEN', unfinished(name)) >= most_jobs then return 'jobs', 0 end
  if not most_audio_ms then return end
  local used = tonumber(redis.call('GET', audio_used(name)) or '0')
  if used >= most_audio_ms then return 'audio', midnight_after(now) - now end
  if used + tonumber(redis.call('GET', held(name)) or '0') >= most_audio_ms then
    return 'audio', 0
  end
end

-- Webhooks. What is to be told waits by receiver, so that one that is slow delays no other.
local function receiver_of(url)
  return string.match(url, '^%a+://[^/?#]+')
end

-- When is this receiver's first delivery due?
local function look_at(receiver)
  local first = redis.call('ZRANGE', deliveries(receiver), 0, 0, 'WITHSCORES')
  if first[2] then
    redis.call('ZADD', RECEIVERS, first[2], receiver)
  else
    redis.call('ZREM', RECEIVERS, receiver)
  end
end

local function deliver_at(receiver, id, due)
  redis.call('ZADD', deliveries(receiver), digits(due), id)
  look_at(receiver)
end

local function stop_delivery(receiver, id)
  redis.call('ZREM', deliveries(receiver), id)
  redis.call('ZREM', UNDELIVERED, id)
  look_at(receiver)
end

local function begin_delivery(id, url, now, lifetime_ms)
  redis.call('HSET', delivery(id), 'state', 'pending', 'tries', '0')
  live_at_least(delivery(id), lifetime_ms)
  redis.call('ZADD', UNDELIVERED, digits(now), id)
  deliver_at(receiver_of(url), id, now)
end

-- Gives one job its terminal status and its lifetime. Returns whether it did, and the job's owner.
local function end_job(id, now, status, code, message, facts, retention_ms, grace_ms)
  local fp, ended, owner, of_batch, key, url = unpack(redis.call('HMGET', job(id), 'fingerprint',
    'status', 'owner', 'batch', 'idempotency', 'webhook_url'))
  if not fp or ended then return false end
  if owner then let_go(owner, id) end
  redis.call('ZADD', LISTED, digits(now + retention_ms), listed_as(id, owner, of_batch))
  if key and redis.call('EXISTS', idempotency(key)) == 1
      and redis.call('HINCRBY', idempotency(key), 'unfinished', -1) == 0 then
    redis.call('PEXPIRE', idempotency(key), digits(retention_ms))
  end
  redis.call('HSET', job(id), 'status', status, 'finished_ms', digits(now),
    'expires_ms', digits(now + retention_ms), 'error_code', code, 'error_message', message,
    unpack(facts))
  redis.call('PEXPIRE', job(id), digits(retention_ms + grace_ms))
  if url then begin_delivery(id, url, now, retention_ms + grace_ms) end
  return true, owner
end

-- A job that has ended goes, as if it had never been, to enter again: what end_job() noted is taken
-- back. Its webhook is told of the next end instead.
local function forget_end(id)
  local fp, owner, of_batch, url = unpack(redis.call('HMGET', job(id), 'fingerprint', 'owner', 'batch',
    'webhook_url'))
  redis.call('ZREM', LISTED, listed_as(id, owner, of_batch))
  redis.call('SREM', holders(fp), id)
  if url then stop_delivery(receiver_of(url), id) end
  redis.call('DEL', job(id), delivery(id))
end

-- Ends a transcription and every job that holds it. Each of their owners pays once for a transcript.
-- Returns the ids of those jobs.
local function end_transcription(fp, now, status, code, message, retention_ms, grace_ms)
  dequeue(QUEUE, fp)
  redis.call('ZREM', LEASES, fp)
  redis.call('HSET', transcription(fp), 'status', status, 'finished_ms', digits(now))
  redis.call('HDEL', transcription(fp), 'claim_id')
  drop_parts(fp)
  live_at_least(transcription(fp), retention_ms + grace_ms)
  live_at_least(holders(fp), retention_ms + grace_ms)
  local ids, facts, paid = redis.call('SMEMBERS', holders(fp)), facts_of(fp), {}
  for _, id in ipairs(ids) do
    local ended, owner = end_job(id, now, status, code, message, facts, retention_ms, grace_ms)
    if ended then count('jobs_' .. status) end
    if owner and status == 'completed' and not paid[owner] then
      charge(owner, redis.call('HGET', transcription(fp), 'duration'), now)
      paid[owner] = true
    end
  end
  tell(fp, 'ended')
  return ids
end

-- Back to its queue, at its old place.
local function requeue(unit)
  redis.call('ZREM', LEASES, unit)
  redis.call('HSET', transcription(unit), 'status', 'queued')
  redis.call('HDEL', transcription(unit), 'claim_id', 'worker')
  if redis.call('HGET', transcription(unit), 'stage') ~= 'join' then -- else its parts stay done
    set_progress(unit, '0')
    redis.call('HDEL', transcription(unit), 'started_ms')
  end
  enqueue(parent_of(unit) and PARTS or QUEUE, unit)
  tell(parent_of(unit) or unit, 'moved')
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
