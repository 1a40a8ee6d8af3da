-- A caller wants its webhook told again, now, with as many tries as at first.
-- ARGV  1 job id  2 who asks ('' sees all)  3 how long everything is kept at least (ms)
-- returns  unknown | none (it has no webhook) | unfinished | sending (nothing changed) | begun
local id, now = ARGV[1], now_ms()
if not fingerprint_seen_by(ARGV[2], id) then return 'unknown' end
local url, ended = unpack(redis.call('HMGET', job(id), 'webhook_url', 'status'))
if not url then return 'none' end
if not ended then return 'unfinished' end
local lease = redis.call('HEXISTS', delivery(id), 'claim_id') == 1
  and redis.call('ZSCORE', deliveries(receiver_of(url)), id)
if lease and tonumber(lease) > now then return 'sending' end
live_at_least(job(id), tonumber(ARGV[3]))
begin_delivery(id, url, now, tonumber(ARGV[3]))
return 'begun'
