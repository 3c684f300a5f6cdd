"""What lends the memory: the broker, the donor agents and their memory functions.

Nothing here is imported by clients; the two sides meet in `memfaas.messages` and on sockets. The
broker's rules are in `tables`, and what goes around them in `broker`, `sessions`, `placement` and
`status`. A donor's agent (`donor`, `custody`, `pool`, `home`, `memory`) keeps the memory of leases; a
function (`zygote`, `function`, `serving`, `door`) serves one of them.
"""
