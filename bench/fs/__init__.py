"""Measures a mount beside what limits it."""
