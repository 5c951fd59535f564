#!/usr/bin/env bash
# The GPU benchmark as one command for a machine with CUDA, torch, transformers, accelerate and peft, and no network:
#   benchmarks/gpu.sh --collect                            # before, elsewhere: puts wheels into benchmarks/wheels
#   benchmarks/gpu.sh --output build/gpu.json --minutes 9  # there; options are those of gpu.py
# PYTHON names the interpreter to use; TARGET_PYTHON, of --collect, the version that the wheels are for.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
wheels=$repository/benchmarks/wheels
python=${PYTHON:-python3}
limit_mebibytes=64

collect() {
  local list=$repository/benchmarks/wheels.txt platforms=() version
  for version in 2_28 2_27 2_26 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${version}_x86_64"); done
  platforms+=(--platform manylinux2014_x86_64 --platform manylinux2010_x86_64 --platform manylinux1_x86_64)
  rm -rf "$wheels"
  mkdir -p "$wheels"
  # DeepSpeed is published as source alone; none of its extensions are built into the wheel, so it fits every Python.
  grep -v '^deepspeed' "$list" | "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp \
    --python-version "${TARGET_PYTHON:-3.12}" "${platforms[@]}" -d "$wheels" -r /dev/stdin
  DS_BUILD_OPS=0 "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$wheels" "$(grep '^deepspeed' "$list")"
  du -k "$wheels"/*.whl | sort -n | sed "s|$wheels/||"
  local kibibytes
  kibibytes=$(du -ck "$wheels"/*.whl | tail -1 | cut -f1)
  echo "$(((kibibytes + 1023) / 1024)) MiB in $wheels"
  [ "$kibibytes" -le $((limit_mebibytes * 1024)) ] || { echo "gpu.sh: more than $limit_mebibytes MiB" >&2; exit 1; }
}

if [ "${1:-}" = --collect ]; then
  collect
  exit
fi

# A folder of packages in front of the interpreter's own: in an environment made from a virtual one, as some machines
# have it, torch would be missing.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$wheels/*.whl" >/dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
fi
# DeepSpeed's extensions are compiled at first use, by ninja.
PATH=$(dirname "$("$python" -c 'import sys; print(sys.executable)')"):$PATH
export PATH PYTHONPATH="$site:$repository" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
# Not replaced by the benchmark, so that the folder is removed at its end; a signal is passed on.
"$python" "$repository/benchmarks/gpu.py" "$@" &
trap 'kill -TERM $! 2>/dev/null || true; wait $! || true; rm -rf "$site"; exit 143' TERM INT
wait $!
