"""Slurm: its hooks, which take memory back for a job and lend it again, and stores for jobs that ask for one.

Slurm runs `hook` as a job starts and ends, and `stores` from burst_buffer.lua; `files` writes what calls
them. A hook must never be the reason that a job does not start, so each keeps a time limit of its own
and always succeeds.
"""
