-- A page of a list of jobs, the newest first. It costs by what a page may look at, however long the
-- list is: where few jobs have the wanted status, a page may be short, or empty, and not the last.
-- ARGV  1 owner of the list, '' for a batch  2 batch id, '' for an owner's  3 who asks ('' sees all)
--       4 where to go on: the cursor of the page before, '' for the newest  5 wanted status, '' for all
--       6 most jobs in the page  7 most jobs to look at
-- returns  {cursor of the next page, '' if there is none; {id, as seen_job()} of each job}
local wanted, most, far = ARGV[5], tonumber(ARGV[6]), tonumber(ARGV[7])
local list = ARGV[2] == '' and jobs(ARGV[1]) or batch(ARGV[2])
local now = now_ms()

-- Seen, of the wanted status, and not expired.
local function find(id)
  local fp = fingerprint_seen_by(ARGV[3], id)
  if not fp or is_gone(id, now) then return end
  local status = wanted ~= '' and (redis.call('HGET', job(id), 'status')
    or redis.call('HGET', transcription(fp), 'status'))
  return (wanted == '' or wanted == status) and {id, seen_job(ARGV[3], id)}
end

local first = ARGV[4] == '' and '+inf' or '(' .. ARGV[4]
local places = redis.call('ZREVRANGEBYSCORE', list, first, '-inf', 'WITHSCORES', 'LIMIT', 0, far + 1)
local page = {}
for n = 1, math.min(#places, 2 * far), 2 do
  local found = find(places[n])
  if found then table.insert(page, found) end
  if (#page == most or n == 2 * far - 1) and places[n + 2] then return {places[n + 1], page} end
end
return {'', page}
