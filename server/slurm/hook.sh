#!/bin/sh
# Written by `memfaas slurm install`; to change it, run that again.
# @WHAT@
: "${SLURM_CONF:=@SLURM_CONF@}"
export SLURM_CONF
PATH=@PATH@
export PATH
@GUARD@
# In our process group, so that Slurm ends it with us. It ends itself before; this is for one that cannot.
timeout --foreground -k 1 @KILL_AFTER@ @CALL@
exit 0
