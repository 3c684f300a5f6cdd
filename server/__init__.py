"""What lends the memory: the broker, the donor agent, and the memory functions it starts.

The broker keeps the leases and knows the donors. A donor agent runs on each node that lends
memory and starts one memory function for each lease. Nothing in here imports `memfaas.client`;
what both sides need lives in `memfaas`.
"""
