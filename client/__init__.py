"""What uses the memory: sessions with the broker, stores, regions, and the local cluster.

The names that users need are exported by `memfaas` itself. Nothing in here imports
`memfaas.server`; a client talks to brokers and donors over their sockets alone.
"""
