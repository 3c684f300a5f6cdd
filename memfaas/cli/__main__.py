"""`python -m memfaas.cli`, for where the command `memfaas` is not on the path."""

from memfaas.cli import main

main(prog_name="memfaas")
