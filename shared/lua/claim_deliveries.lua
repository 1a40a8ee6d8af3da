-- A sender takes what is due, one delivery of each receiver, the longest due first. Nobody else sends
-- it while the lease lasts; when that ends, for the sender died, it is due again.
-- ARGV  1 how many  2 claim id  3 lease ms  4 the most tries  5... receivers to leave alone
-- returns  for each {job id, receiver, the job's record, number of this attempt, tries with this one}
local now = now_ms()
local wanted, left_alone = tonumber(ARGV[1]), {}
for n = 5, #ARGV do left_alone[ARGV[n]] = true end

local function take(receiver, id)
  local record = redis.call('HGETALL', job(id))
  if #record == 0 then -- it has expired
    stop_delivery(receiver, id)
    return nil
  end
  local tries = redis.call('HINCRBY', delivery(id), 'tries', 1)
  if tries > tonumber(ARGV[4]) then -- its senders died
    redis.call('HSET', delivery(id), 'state', 'failed')
    stop_delivery(receiver, id)
    return nil
  end
  local number = redis.call('HINCRBY', delivery(id), 'attempts', 1)
  redis.call('HSET', delivery(id), 'claim_id', ARGV[2], 'attempt:' .. number,
    cjson.encode({number = number, at_ms = now, error = 'interrupted'}))
  deliver_at(receiver, id, now + ARGV[3])
  return {id, receiver, record, number, tries}
end

-- Nothing began later than now, unless the clock was set back: then it begins now.
local future = redis.call('ZRANGEBYSCORE', UNDELIVERED, '(' .. digits(now), '+inf', 'LIMIT', 0, 100)
for _, id in ipairs(future) do
  redis.call('ZADD', UNDELIVERED, digits(now), id)
  local url = redis.call('HGET', job(id), 'webhook_url')
  if url then deliver_at(receiver_of(url), id, now) end
end

local claimed = {}
local due = redis.call('ZRANGEBYSCORE', RECEIVERS, '-inf', digits(now), 'LIMIT', 0, wanted + #ARGV)
for _, receiver in ipairs(due) do
  if #claimed == wanted then break end
  if not left_alone[receiver] then
    local id = redis.call('ZRANGE', deliveries(receiver), 0, 0)[1]
    claimed[#claimed + 1] = take(receiver, id)
  end
end
return claimed
