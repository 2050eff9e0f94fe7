#!/usr/bin/env bash
# Training on Cloud TPU VMs: a single host, a pod, or several slices.
#
#   export TPU_NAME=wan ZONE=us-west4-a    # and SLICES=2 for two slices
#   launch/tpu_vm.sh [--dry-run] create    # ACCELERATOR_TYPE (v5litepod-16), SPOT=1, RUNTIME_VERSION
#   launch/tpu_vm.sh [--dry-run] status
#   launch/tpu_vm.sh [--dry-run] install   # the commit that is checked out, onto every worker
#   launch/tpu_vm.sh [--dry-run] run COMMAND...   # on every worker, in the repository's folder
#   launch/tpu_vm.sh [--dry-run] train --config FILE --workdir DIR [--config.field=value ...]
#   launch/tpu_vm.sh [--dry-run] delete
#
# Paths are those of the workers; DIR is on a filesystem that all of them share.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
action=${1:-}
shift || true
SLICES=${SLICES:-1}

queue=(gcloud compute tpus queued-resources)
if [[ $SLICES -gt 1 ]]; then
  nodes=("--node-count=$SLICES")
  workers=("${queue[@]}")
  all=(--node=all --worker=all --batch-size=all)
else
  nodes=("--node-id=${TPU_NAME:-}")
  workers=(gcloud compute tpus tpu-vm)
  all=(--worker=all)
fi

case $action in
  create | status | install | run | train | delete)
    need TPU_NAME "a name for the TPU"
    need ZONE "a zone that has the TPU type, us-west4-a for example"
    ;;
  *) fail "expected create, status, install, run, train or delete, found ${action:-nothing}; see --help" ;;
esac

on_all_workers() {
  run "${workers[@]}" ssh "$TPU_NAME" --zone="$ZONE" "${all[@]}" --command="$1"
}

case $action in
  create)
    ACCELERATOR_TYPE=${ACCELERATOR_TYPE:-v5litepod-16}
    case $ACCELERATOR_TYPE in
      v5litepod-*) RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5-lite} ;;
      v5p-*) RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv5} ;;
      v6e-*) RUNTIME_VERSION=${RUNTIME_VERSION:-v2-alpha-tpuv6e} ;;
      *) need RUNTIME_VERSION "the TPU software version for $ACCELERATOR_TYPE" ;;
    esac
    run "${queue[@]}" create "$TPU_NAME" --zone="$ZONE" "${nodes[@]}" \
      --accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION" ${SPOT:+--spot}
    ;;
  status)
    run "${queue[@]}" describe "$TPU_NAME" --zone="$ZONE"
    ;;
  install)
    archive=${TMPDIR:-/tmp}/rehyat_jax.tar.gz
    run git -C "$root" archive --prefix=rehyat_jax/ --output="$archive" HEAD
    run "${workers[@]}" scp "$archive" "$TPU_NAME:" --zone="$ZONE" "${all[@]}"
    # The runtime's own Python is older than 3.11.
    uv='curl -LsSf https://astral.sh/uv/install.sh | sh'
    venv="\$HOME/.local/bin/uv venv --allow-existing --seed --python 3.11"
    on_all_workers "tar -xzf rehyat_jax.tar.gz && cd rehyat_jax && $uv && $venv && .venv/bin/pip install -e '.[tpu]'"
    ;;
  run)
    [[ $# -gt 0 ]] || fail "run: expected a command, found nothing"
    on_all_workers "cd rehyat_jax && $(shell_words "$@")"
    ;;
  train)
    need_training_arguments "$@"
    on_all_workers "cd rehyat_jax && .venv/bin/python -m rehyat_jax.train $(shell_words "$@")"
    ;;
  delete)
    run "${queue[@]}" delete "$TPU_NAME" --zone="$ZONE" --force
    ;;
esac
