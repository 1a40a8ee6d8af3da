-- How a job's webhook was told of its end.
-- ARGV  1 job id  2 who asks ('' sees all)
-- returns  {} if the job is unknown, else {receiver ('' if it has none), fields of the delivery,
--          when it is due (ms) or '', how often the job was retried}
local id = ARGV[1]
if not fingerprint_seen_by(ARGV[2], id) then return {} end
local url, retries = unpack(redis.call('HMGET', job(id), 'webhook_url', 'retries'))
if not url then return {'', {}, '', '0'} end
local due = redis.call('ZSCORE', deliveries(receiver_of(url)), id)
local shown = due and digits(tonumber(due)) or ''
return {receiver_of(url), redis.call('HGETALL', delivery(id)), shown, retries or '0'}
