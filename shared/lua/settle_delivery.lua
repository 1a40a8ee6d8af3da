-- What came of an attempt, from the sender that claimed it.
-- ARGV  1 job id  2 claim id  3 delivered | failed | pending (to be tried again)  4 in so many ms
--       5 the attempt (JSON); '' if nothing was sent, which is no try  6 how many attempts are kept
--       7 how long everything is kept at least, for the next try (ms)
-- returns  ok | lost (another claim may own it; nothing was written)
local id, state = ARGV[1], ARGV[3]
local claim_id, number = unpack(redis.call('HMGET', delivery(id), 'claim_id', 'attempts'))
local url = redis.call('HGET', job(id), 'webhook_url')
if claim_id ~= ARGV[2] or not url then return 'lost' end
local receiver = receiver_of(url)
redis.call('HDEL', delivery(id), 'claim_id')
redis.call('HSET', delivery(id), 'state', state)
if ARGV[5] == '' then
  redis.call('HDEL', delivery(id), 'attempt:' .. number)
  redis.call('HINCRBY', delivery(id), 'attempts', -1)
  redis.call('HINCRBY', delivery(id), 'tries', -1)
else
  redis.call('HSET', delivery(id), 'attempt:' .. number, ARGV[5])
  redis.call('HDEL', delivery(id), 'attempt:' .. (number - ARGV[6]))
end
if state == 'pending' then
  live_at_least(job(id), tonumber(ARGV[7]))
  live_at_least(delivery(id), tonumber(ARGV[7]))
  deliver_at(receiver, id, now_ms() + ARGV[4])
else
  stop_delivery(receiver, id)
end
return 'ok'
