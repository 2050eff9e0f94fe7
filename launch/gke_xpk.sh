#!/usr/bin/env bash
# Training on TPUs of a GKE cluster made by XPK.
#
#   export PROJECT=... ZONE=... CLUSTER=... WORKLOAD=wan IMAGE=...   # the image of launch/Dockerfile
#   export STORAGE=...       # attached to the cluster with `xpk storage attach`, writable
#   launch/gke_xpk.sh [--dry-run] --config FILE --workdir DIR [--config.field=value ...]
#
# TPU_TYPE (v5litepod-16), SLICES (1) and MAX_RESTARTS (10) may be set. DIR is below the storage's mount point.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROJECT "a Google Cloud project"
need ZONE "the cluster's zone"
need CLUSTER "the cluster's name"
need WORKLOAD "a name for this run"
need IMAGE "an image built from launch/Dockerfile"
need STORAGE "a storage that all workers mount"
need_training_arguments "$@"

# 75 is the end of a run that was asked to stop and has saved everything; the seconds are for a step and a save.
run xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$WORKLOAD" \
  --tpu-type="${TPU_TYPE:-v5litepod-16}" --num-slices="${SLICES:-1}" --docker-image="$IMAGE" \
  --storage="$STORAGE" --max-restarts="${MAX_RESTARTS:-10}" \
  --restart-on-exit-codes=75 --termination-grace-period-seconds=600 \
  --command="python -m rehyat_jax.train $(shell_words "$@")"
