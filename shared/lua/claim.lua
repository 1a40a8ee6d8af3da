-- A worker takes the unit of work that should run next: queued -> processing.
-- This is the one place that decides the order of work. Transcriptions go before parts of long
-- recordings, the oldest first; every fourth turn for which both wait goes to the parts, so that
-- neither starves.
-- ARGV  1 claim id  2 worker id  3 lease ms  4 1 if the worker would take a part
-- returns  {} if nothing is queued, else {unit, fields of its transcription, attempts, up to 20
--          holder ids}
local FAIR_TURN = 4
local now = now_ms()

local function next_unit()
  local whole = redis.call('ZRANGE', QUEUE, 0, 0)[1]
  local of_long = ARGV[4] == '1' and redis.call('ZRANGE', PARTS, 0, 0)[1]
  if of_long and (not whole or redis.call('HINCRBY', COUNTERS, 'turns', 1) % FAIR_TURN == 0) then
    return of_long, PARTS
  end
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
  if not unit then return {} end
  redis.call('ZREM', queue, unit)
  if is_waiting(unit) then
    redis.call('HSET', transcription(unit), 'status', 'processing', 'claim_id', ARGV[1],
      'worker', ARGV[2])
    redis.call('HSETNX', transcription(unit), 'started_ms', digits(now))
    local attempts = redis.call('HINCRBY', transcription(unit), 'attempts', 1)
    redis.call('ZADD', LEASES, digits(now + ARGV[3]), unit)
    local fp = parent_of(unit) or unit
    local some = redis.call('SRANDMEMBER', holders(fp), 20)
    return {unit, redis.call('HGETALL', transcription(fp)), attempts, some}
  end
end
