-- A worker proves that a claim is alive, and reports how far it is.
-- ARGV  1 unit of work  2 claim id  3 lease ms  4 progress 0-1
-- returns  ok | cancelled (nobody wants it any more) | lost (another claim may own it)
local unit = ARGV[1]
local now = now_ms()
if not owns(unit, ARGV[2], now) then
  local status = redis.call('HGET', transcription(parent_of(unit) or unit), 'status')
  return status == 'cancelled' and 'cancelled' or 'lost'
end
redis.call('ZADD', LEASES, digits(now + ARGV[3]), unit)
if redis.call('HGET', transcription(unit), 'stage') == 'join' then return 'ok' end -- its parts are done
if set_progress(unit, ARGV[4]) then tell(parent_of(unit) or unit, 'moved') end
return 'ok'
