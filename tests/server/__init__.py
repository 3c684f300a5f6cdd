"""Tests of what lends the memory."""
