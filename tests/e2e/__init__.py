"""Whole clusters of real processes, and clients that notice nothing of what happens to them."""
