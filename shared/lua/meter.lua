-- A named caller asks for something: the request is counted, or refused and not counted. So many
-- requests at once, and so many in each period in the long run (GCRA); and before an upload is read,
-- whether the caller may submit.
-- ARGV  1 name  2, 3 requests in a period of so many ms  4 1 if it submits  5 most jobs  6 most audio
--       (ms). '' is no limit
-- returns  {limit, ms}: limit is none | rate | jobs | audio; ms: as limit_reached()
local name, requests = ARGV[1], tonumber(ARGV[2])
local now = now_us()
if requests then
  local interval = math.floor(ARGV[3] * 1000 / requests)
  local last = tonumber(redis.call('GET', rate(name)) or '0')
  -- Later than a period from now: by a slower key of the name, or a clock that was set back.
  local due = math.max(now, math.min(last, now + requests * interval)) + interval
  local early = due - now - requests * interval
  if early > 0 then return {'rate', math.ceil(early / 1000)} end
  redis.call('SET', rate(name), digits(due), 'PX', digits(math.ceil((due - now) / 1000)))
end
if ARGV[4] == '1' then
  local limit, ms = limit_reached(name, tonumber(ARGV[5]), tonumber(ARGV[6]), math.floor(now / 1000))
  if limit then return {limit, ms} end
end
return {'none', 0}
