#!/usr/bin/env bash
# Training on GPUs of a Slurm cluster: one process per GPU, which is how JAX reads Slurm.
#
#   export NODES=2 GPUS_PER_NODE=8
#   launch/slurm.sh [--dry-run] --config FILE --workdir DIR [--config.field=value ...]
#
# PYTHON (python) is the interpreter. Whatever else the cluster wants is given as sbatch reads it from the environment:
# SBATCH_ACCOUNT, SBATCH_PARTITION, SBATCH_TIMELIMIT. DIR is on a filesystem that all nodes share.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need NODES "the number of nodes"
need GPUS_PER_NODE "the number of GPUs of a node"
need_training_arguments "$@"

# Every task sees all GPUs of its node and JAX takes the one of its local rank; --gpus-per-task would hide the others.
run sbatch --job-name=rehyat_jax --nodes="$NODES" --ntasks-per-node="$GPUS_PER_NODE" --gpus-per-node="$GPUS_PER_NODE" \
  --requeue --open-mode=append --chdir="$root" \
  --wrap="srun --kill-on-bad-exit=1 $(shell_words "${PYTHON:-python}" -m rehyat_jax.train "$@")"
