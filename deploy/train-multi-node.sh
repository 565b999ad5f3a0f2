#!/bin/sh
# One run on every machine of a hostfile, over ssh. Each needs this package, the recipe, the data and the base at the
# same paths, and must reach the first host at port 29500 (distributed.master_port changes it). Files are written on the
# first machine only. Ctrl-C stops all of them after their update.
#
# When a process is lost, on whichever machine, all of them end within seconds, and this with exit code 2; the launcher of
# that machine says which process it was. The same command goes on from the last checkpoint.
#
# usage: deploy/train-multi-node.sh RECIPE [KEY=VALUE]...
# settings: HOSTFILE=deploy/hostfile, STRATEGY=zero3 (or fsdp2, ddp), BIN=.venv/bin (where pingjia is, on every machine)
set -eu
recipe=$1
shift
hostfile=${HOSTFILE:-deploy/hostfile}
strategy=${STRATEGY:-zero3}
bin=${BIN:-.venv/bin}
directory=$(pwd)
node=0
workers=
trap 'kill -INT $workers 2>/dev/null || true' INT TERM
for host in $(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }'); do
  # -tt: a signal here reaches the run there
  ssh -tt "$host" "cd '$directory' && $bin/pingjia train '$recipe' distributed.strategy=$strategy \
    distributed.hostfile='$hostfile' distributed.node_rank=$node $*" </dev/null &
  workers="$workers $!"
  node=$((node + 1))
done
status=0
for worker in $workers; do
  wait "$worker" || status=$?
done
exit $status
