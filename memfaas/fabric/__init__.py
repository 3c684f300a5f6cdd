"""How bytes move between a client and a memory function.

One module for each fabric (`shm` maps the memory of a function on the same node, `tcp` sends
framed requests to one anywhere) opens *links*: a link is one client's open path to one lease.
What a link is opened with is a ticket; what it offers is the same on every fabric.
"""
