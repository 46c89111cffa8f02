#!/bin/sh
# Several machines with torchrun: the same line on each, with its own NODE_RANK (0 .. NODES - 1).
#
#   NODES=2 NODE_RANK=0 HEAD=gpu01 sh recipes/launch/torchrun.sh pretrain/diffusion.yaml resume=auto
#
# A rank that dies, or takes no step for run.hang_minutes, is named, and the others end with it.
# The checkout and runs/ lie on a disk that all machines share. What fails is started again by whoever starts this, with
# resume=auto; the losses are those of a run that was not interrupted.
set -eu
exec torchrun --nnodes "${NODES:-1}" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${GPUS:-8}" \
    --master_addr "${HEAD:-localhost}" --master_port "${PORT:-29500}" -m conceptron train "$@"
