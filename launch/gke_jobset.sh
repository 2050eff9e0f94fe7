#!/usr/bin/env bash
# Training on TPUs of any GKE cluster with JobSet installed: fills in launch/gke_jobset.yaml and applies it.
#
#   export NAME=wan IMAGE=...      # the image of launch/Dockerfile
#   export CLAIM=...               # a ReadWriteMany PersistentVolumeClaim, mounted at /shared
#   launch/gke_jobset.sh [--dry-run] --config FILE --workdir /shared/DIR [--config.field=value ...]
#
# What may be set, for a slice of v5e-16: ACCELERATOR (tpu-v5-lite-podslice), TOPOLOGY (4x4), HOSTS (4), CHIPS of a host
# (4); SLICES (1), MAX_RESTARTS (10).

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need NAME "a name for this run"
need IMAGE "an image built from launch/Dockerfile"
need CLAIM "the name of a PersistentVolumeClaim that all pods mount"
need_training_arguments "$@"
ACCELERATOR=${ACCELERATOR:-tpu-v5-lite-podslice} TOPOLOGY=${TOPOLOGY:-4x4} HOSTS=${HOSTS:-4} CHIPS=${CHIPS:-4}
SLICES=${SLICES:-1} MAX_RESTARTS=${MAX_RESTARTS:-10}

# YAML's single quotes keep everything; a quote within is doubled. Kubernetes reads $(NAME) as a variable, $$ as a $.
quote="'" ARGUMENTS=
for argument in "$@"; do
  argument=${argument//"\$("/"\$\$("}
  ARGUMENTS+=", '${argument//$quote/$quote$quote}'"
done
ARGUMENTS="[${ARGUMENTS#, }]"

manifest=$(< "$root/launch/gke_jobset.yaml")
for variable in NAME IMAGE CLAIM ACCELERATOR TOPOLOGY HOSTS CHIPS SLICES MAX_RESTARTS ARGUMENTS; do
  manifest=${manifest//"\${$variable}"/"${!variable}"}
done

if [[ $dry_run ]]; then
  printf '%s\n' "kubectl apply --filename=- <<'EOF'" "$manifest" EOF
else
  kubectl apply --filename=- <<< "$manifest"
fi
