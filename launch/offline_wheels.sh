#!/usr/bin/env bash
# Downloads the packages that a machine without network lacks. Runs on a machine that has a package registry.
#
#   launch/offline_wheels.sh [--dry-run] FOLDER [--python 3.12] [--installed FILE]
#
# FOLDER is a new folder, which receives wheels for x86-64 Linux and that version of Python. FILE is the output of
# `python3 -m pip list --format=freeze` on the machine without network: what it lacks or has too old is downloaded.
# Without FILE, that is ArrayRecord, diffusers, Grain, ml_collections, Orbax, portpicker, PyAV, and two packages that
# diffusers needs.
# PyTorch, JAX, CUDA's packages and imageio-ffmpeg are never downloaded.
#
# PYTHON (python3: 3.11 or newer, with pip) and MAX_MB (60), the wheels' total size at most, may be set.

# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
PYTHON=${PYTHON:-python3}
MAX_MB=${MAX_MB:-60}

folder='' version=3.12 installed=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --python | --installed)
      [[ $# -gt 1 ]] || fail "$1: expected a value, found nothing; see --help"
      set -- "$1=$2" "${@:3}"
      ;;
    --python=*) version=${1#*=} && shift ;;
    --installed=*) installed=("$1") && shift ;;
    -*) fail "expected FOLDER, --python or --installed, found $1; see --help" ;;
    *)
      [[ ! $folder ]] || fail "expected one FOLDER, found $folder and $1; see --help"
      folder=${1%/} && shift
      ;;
  esac
done
[[ $folder ]] || fail "FOLDER is missing; see --help"
[[ ! -e $folder ]] || fail "$folder: expected a new folder, found one that exists; remove it, or choose another"
[[ $version =~ ^3\.(1[1-9]|[2-9][0-9])$ ]] || fail "--python: expected 3.11 or newer, found $version"
"$PYTHON" -c 'import pip, tomllib' 2> /dev/null ||
  fail "PYTHON: expected Python 3.11 or newer with pip, found $PYTHON; export PYTHON=..."
[[ $MAX_MB =~ ^[1-9][0-9]{0,5}$ ]] || fail "MAX_MB: expected a whole number of megabytes, found $MAX_MB"

download=("$PYTHON" -m pip download -qq --disable-pip-version-check --no-deps --only-binary=:all:
  --implementation cp --python-version "$version" --platform manylinux2014_x86_64)
for glibc in {17..28}; do
  download+=(--platform "manylinux_2_${glibc}_x86_64")
done

# Prints what is still to be downloaded next to the wheels in a folder.
lacking() {
  "$PYTHON" "$root/launch/offline_requirements.py" --python "$version" ${installed[@]+"${installed[@]}"} "$1" ||
    fail "see the line above; nothing was kept"
}

lines=$(lacking "$folder")
if [[ ! $lines ]]; then
  echo "nothing to download: ${installed[*]#*=} has everything already"
  exit
fi
if [[ $dry_run ]]; then
  mapfile -t requirements <<< "$lines"
  run "${download[@]}" --dest "$folder" "${requirements[@]}"
  exit
fi

partial=$(mktemp -d "$(dirname "$folder")/.offline_wheels.XXXXXX") ||
  fail "$folder: cannot be made; choose a new folder within one that exists"
trap 'rm -rf "$partial"' EXIT
mkdir "$partial/wheels"
while [[ $lines ]]; do
  mapfile -t requirements <<< "$lines"
  run "${download[@]}" --dest "$partial/wheels" "${requirements[@]}" ||
    fail "pip could not download ${requirements[*]}; look at its message above, and whether the registry has wheels" \
      "for Python $version; nothing was kept"
  bytes=$(cat "$partial"/wheels/*.whl | wc -c)
  ((bytes <= MAX_MB * 1000000)) ||
    fail "expected at most $MAX_MB MB of wheels, found $bytes bytes with ${requirements[*]}; install the largest" \
      "there in another way and add it to the --installed FILE, or export MAX_MB=...; nothing was kept"
  lines=$(lacking "$partial/wheels")
done
mv "$partial/wheels" "$folder"

for wheel in "$folder"/*.whl; do
  printf '%9d %s\n' "$(wc -c < "$wheel")" "${wheel##*/}"
done
wheels=("$folder"/*.whl)
files="$(shell_words "$folder")/*.whl"
echo "$bytes bytes in ${#wheels[@]} wheels. Copy $folder to the machine, and install them there in a virtual environment:"
echo "  python3 -m pip install --no-index --no-deps $files"
echo "or in a new folder DIR, where the machine's Python is not to be changed:"
echo "  python3 -m pip install --no-index --no-deps --target DIR $files && export PYTHONPATH=DIR"
