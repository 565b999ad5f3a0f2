#!/bin/sh
# The same run started by torchrun instead of by pingjia's own launcher: on every machine, NODE_RANK = 0, 1, ...
# torchrun says how many processes there are; the recipe says only how they share the network.
#
# usage: NODES=2 NODE_RANK=0 MASTER=node1 deploy/train-torchrun.sh RECIPE [KEY=VALUE]...
# settings: PROCESSES=4 (here), STRATEGY=fsdp2 (or ddp, zero3), PORT=29500, BIN=.venv/bin
# DeepSpeed's launcher does as well:
#   deepspeed --hostfile deploy/hostfile --module pingjia.cli.main train RECIPE distributed.strategy=zero3
set -eu
recipe=$1
shift
exec "${BIN:-.venv/bin}/torchrun" \
  --nnodes "${NODES:-1}" --node-rank "${NODE_RANK:-0}" \
  --nproc-per-node "${PROCESSES:-4}" \
  --master-addr "${MASTER:-127.0.0.1}" --master-port "${PORT:-29500}" \
  --module pingjia.cli.main train "$recipe" "distributed.strategy=${STRATEGY:-fsdp2}" "$@"
