"""`make bench`: what the service costs and gains, as ratios of two arms on the same machine."""
