#!/bin/sh
# One run on every machine of a hostfile, over ssh. Each needs this package, the recipe, the data and the base at the
# same paths, and must reach the first host at port 29500 (distributed.master_port changes it). Files are written on the
# first machine only. Ctrl-C stops all of them after their update.
#
# usage: deploy/train-multi-node.sh RECIPE [KEY=VALUE]...      (HOSTFILE=deploy/hostfile, STRATEGY=zero3)
set -eu
recipe=$1
shift
hostfile=${HOSTFILE:-deploy/hostfile}
strategy=${STRATEGY:-zero3}
directory=$(pwd)
node=0
workers=
trap 'kill -INT $workers 2>/dev/null || true' INT TERM
for host in $(sed 's/#.*//' "$hostfile" | awk 'NF { print $1 }'); do
  # -tt: a signal here reaches the run there
  ssh -tt "$host" "cd '$directory' && .venv/bin/pingjia train '$recipe' distributed.strategy=$strategy \
    distributed.hostfile='$hostfile' distributed.node_rank=$node $*" </dev/null &
  workers="$workers $!"
  node=$((node + 1))
done
status=0
for worker in $workers; do
  wait "$worker" || status=$?
done
exit $status
