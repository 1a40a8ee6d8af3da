-- How much goes before what a caller would send now? Nothing is written.
-- ARGV  1 owner ('' if nobody has a name)
-- returns  weight, at most
return weight_before(ARGV[1])
