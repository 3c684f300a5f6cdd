"""Tests of what uses the memory."""
