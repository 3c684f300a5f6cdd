"""What `memfaas bench trace` needs besides memfaas: the machine's trace, jobs that fit it, its network, reports."""
