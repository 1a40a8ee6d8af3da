-- One job as its caller sees it, in one round trip.
-- ARGV  1 job id  2 who asks ('' sees all)
-- returns  {} if unknown, else as seen_job()
return seen_job(ARGV[2], ARGV[1]) or {}
