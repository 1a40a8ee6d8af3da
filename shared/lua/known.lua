-- What would become of a submission? Nothing is written.
-- ARGV  1 fingerprint  2 model
-- returns  {new | joined | hit, for joined: up to 20 ids of the jobs that it would join}
local outcome = found(ARGV[1], ARGV[2])
return {outcome, outcome == 'joined' and redis.call('SRANDMEMBER', holders(ARGV[1]), 20) or {}}
