# What the launchers share; to be sourced without arguments, so that it takes its own from theirs.
# shellcheck shell=bash

set -euo pipefail
# shellcheck disable=SC2034
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# need NAME MEANING: fails unless the variable has a value.
need() {
  [[ ${!1:-} ]] || fail "$1 is not set: expected $2; export $1=..."
}

# The words as a shell reads them back.
shell_words() {
  local word words='' quote="'"
  for word in "$@"; do
    case $word in
      '' | *[!A-Za-z0-9_@%+=:,./-]*) word="'${word//$quote/$quote\\$quote$quote}'" ;;
    esac
    words+=" $word"
  done
  printf '%s\n' "${words# }"
}

# need_training_arguments ARGUMENT...
need_training_arguments() {
  local name
  for name in config workdir; do
    [[ " $* " == *" --$name"[=\ ]* ]] ||
      fail "--$name is missing, found: $*; give --config FILE --workdir DIR [--config.field=value ...]"
  done
}

# Runs a command, or prints it.
run() {
  if [[ $dry_run ]]; then
    shell_words "$@"
  else
    "$@"
  fi
}

dry_run=
case ${1:-} in
  --help | -h)
    # The comment at the top of the script.
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    exit
    ;;
  --dry-run)
    dry_run=1
    shift
    ;;
esac
