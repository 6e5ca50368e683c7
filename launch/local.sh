#!/usr/bin/env bash
# launch/local.sh N [--] COMMAND...: N processes of one JAX job on this machine (CPU), for trying multi-process runs.
set -euo pipefail
count=${1:?how many processes}
shift
[[ ${1:-} != -- ]] || shift
: "${1:?a command}"
export JAX_PLATFORMS=cpu JAX_COORDINATOR_ADDRESS=localhost:${PORT:-12321} JAX_NUM_PROCESSES=$count
pids=()
trap 'kill "${pids[@]}" 2>/dev/null || true' EXIT
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i "$@" &
  pids+=($!)
done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit "$code"
