#!/usr/bin/env bash
# Training with SkyPilot: on a TPU pod, or on nodes with GPUs (one process per node).
#
#   export CLUSTER=wan ACCELERATORS=tpu-v6e-16   # or ACCELERATORS=H100:8 NODES=2
#   export BUCKET=...                            # mounted at /shared on every host
#   launch/skypilot.sh [--dry-run] --config FILE --workdir /shared/DIR [--config.field=value ...]

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need CLUSTER "a name for the cluster"
need ACCELERATORS "accelerators as SkyPilot names them, tpu-v6e-16 or H100:8 for example"
need BUCKET "the name of a storage bucket"
need_training_arguments "$@"
case $ACCELERATORS in
  tpu-*) extra=tpu ;;
  *) extra=cuda ;;
esac

run cd "$root" || exit
run sky launch --cluster "$CLUSTER" --gpus "$ACCELERATORS" --num-nodes "${NODES:-1}" \
  --env "EXTRA=$extra" --env "BUCKET=$BUCKET" --env "ARGUMENTS=$(shell_words "$@")" launch/skypilot.yaml
