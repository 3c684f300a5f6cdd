"""`memfaas bench reclaim`: how fast lent memory comes back, beside what the machine can do at all."""
