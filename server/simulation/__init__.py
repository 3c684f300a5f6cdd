"""A cluster without memory: the real broker and the real reclaim policy, on donors that only count bytes.

Made for trio's MockClock: thousands of donors, and hours in seconds. The time that it takes to copy and to
free memory is computed; who decides what to free, where to place it and what to tell whom is the code
that runs on a real cluster.
"""
