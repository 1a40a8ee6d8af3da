-- A worker takes the unit of work that should run next: queued -> processing.
-- This is the one place that decides the order of work. In each queue the first by its place goes
-- first: the earliest start, with the head start of its priority. Transcriptions go before parts of long
-- recordings, unless the first part has a higher priority than the first of them; every fourth turn
-- for which both wait goes the other way, so that neither starves.
-- A unit that has one attempt left may be what killed its workers, or have died beside it. A worker
-- runs one such unit at a time, so that the guilty one takes no other with it into quarantine.
-- ARGV  1 claim id  2 worker id  3 lease ms  4 1 if the worker would take a part
--       5 attempt limit; 0 if the worker would take a unit that has one attempt left
-- returns  {} if nothing is queued, else {unit, fields of its transcription, attempts, up to 20
--          holder ids}
local FAIR_TURN = 4
local FAR = 63 -- how far down a queue is looked
local now, limit = now_ms(), tonumber(ARGV[5])

local function is_last_attempt(unit)
  local attempts = tonumber(redis.call('HGET', transcription(unit), 'attempts') or '0')
  return attempts > 0 and attempts >= limit - 1
end

local function first_of(queue)
  if limit == 0 then return redis.call('ZRANGE', queue, 0, 0)[1] end
  for _, unit in ipairs(redis.call('ZRANGE', queue, 0, FAR)) do
    if not is_last_attempt(unit) then return unit end
  end
end

local function head_start_of(fp)
  return head_start(redis.call('HGET', transcription(fp), 'priority'))
end

local function next_unit()
  local whole = first_of(QUEUE)
  local of_long = ARGV[4] == '1' and first_of(PARTS)
  if not (whole and of_long) then return of_long or whole, of_long and PARTS or QUEUE end
  local is_fair_turn = redis.call('HINCRBY', COUNTERS, 'turns', 1) % FAIR_TURN == 0
  local is_wanted_more = head_start_of(parent_of(of_long)) > head_start_of(whole)
  if is_wanted_more ~= is_fair_turn then return of_long, PARTS end
  return whole, QUEUE
end

-- A recording whose parts are done is processing still; it waits to be joined.
local function is_waiting(unit)
  local status, stage, claim = unpack(
    redis.call('HMGET', transcription(unit), 'status', 'stage', 'claim_id'))
  return status == 'queued' or (status == 'processing' and stage == 'join' and not claim)
end

while true do
  local unit, queue = next_unit()
  if not unit then
    if redis.call('ZCARD', QUEUE) + redis.call('ZCARD', PARTS) == 0 then rest() end
    return {}
  end
  take(queue, unit)
  if is_waiting(unit) then
    redis.call('HSET', transcription(unit), 'status', 'processing', 'claim_id', ARGV[1],
      'worker', ARGV[2])
    redis.call('HSETNX', transcription(unit), 'started_ms', digits(now))
    local attempts = redis.call('HINCRBY', transcription(unit), 'attempts', 1)
    redis.call('ZADD', LEASES, digits(now + ARGV[3]), unit)
    local fp = parent_of(unit) or unit
    local some = redis.call('SRANDMEMBER', holders(fp), 20)
    if fp == unit then tell(fp, 'moved') end
    return {unit, redis.call('HGETALL', transcription(fp)), attempts, some}
  end
end
