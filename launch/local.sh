#!/usr/bin/env bash
# Training in several processes on this machine: on CPUs to try out a run of many, on GPUs one process per GPU.
#
#   PROCESSES=2 launch/local.sh [--dry-run] --config FILE --workdir DIR [--config.field=value ...]
#
# PLATFORM (cpu, or cuda), DEVICES of a process on CPUs (1), PORT (12355) and PYTHON (python) may be set.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
need PROCESSES "the number of processes"
need_training_arguments "$@"

children=()
# Not by SIGTERM, at which they would go on to a common step, and wait there for one that has failed.
[[ $dry_run ]] || trap 'kill -KILL "${children[@]}" 2> /dev/null || true' EXIT
for ((process = 0; process < PROCESSES; process++)); do
  case ${PLATFORM:-cpu} in
    cpu) environment=(JAX_PLATFORMS=cpu "JAX_NUM_CPU_DEVICES=${DEVICES:-1}") ;;
    cuda) environment=("JAX_LOCAL_DEVICE_IDS=$process") ;;
    *) fail "PLATFORM: expected cpu or cuda, found $PLATFORM" ;;
  esac
  command=(env "${environment[@]}" "${PYTHON:-python}" -m rehyat_jax.train
    --coordinator "localhost:${PORT:-12355}" --num_processes "$PROCESSES" --process_id "$process" "$@")
  if [[ $dry_run ]]; then
    shell_words "${command[@]}"
  else
    "${command[@]}" &
    children+=($!)
  fi
done

# The first one that fails ends the others.
for _ in ${children[@]+"${children[@]}"}; do
  wait -n
done
