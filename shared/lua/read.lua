-- Jobs as their callers see them, in one round trip.
-- ARGV  1 job id  2 who asks ('' sees all), and so on in pairs
-- returns  for each pair: {} if unknown, else as seen_job()
local seen = {}
for n = 1, #ARGV, 2 do seen[#seen + 1] = seen_job(ARGV[n + 1], ARGV[n]) or {} end
return seen
