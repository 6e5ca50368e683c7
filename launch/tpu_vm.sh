#!/usr/bin/env bash
# launch/tpu_vm.sh ACTION [ARGS...]: a training run on Cloud TPU VMs, one slice or several, every worker of them.
#
#   create          asks for the slices (a queued resource; waits in line, SPOT=1 takes preemptible ones)
#   state           what became of that
#   setup URL       clones the repository URL on every worker and installs llm_jax[tpu]
#   run COMMAND...  starts COMMAND on every worker, detached and again when it fails (it then resumes): not after exit
#                   code 130 (stopped) or 2 (the command itself is wrong), nor after five failures within 10 min each
#   logs            follows the log of worker 0
#   stop            stops the command everywhere; it saves a checkpoint first
#   delete          gives the slices back
#
# NAME, ZONE, TYPE (v5litepod-256, v5p-128, v6e-256, ...) and RUNTIME say what and where; SLICES=1 how many;
# PYTHON=python3 is that of the VMs (3.11 or newer); DRY_RUN=1 prints what would run. Example:
#   export NAME=llama ZONE=us-west4-a TYPE=v5litepod-256 RUNTIME=v2-alpha-tpuv5-lite
#   launch/tpu_vm.sh run python -m experiments.train --config=experiments/configs/llama2_7b.py \
#     --workdir=gs://BUCKET/7b --config.data.cache=/tmp/tokens
set -euo pipefail
action=${1:?create, state, setup, run, logs, stop or delete}
shift
: "${NAME:?names the queued resource and its nodes}" "${ZONE:?for example us-west4-a}"
slices=${SLICES:-1}

do_it() { if [[ -n ${DRY_RUN:-} ]]; then printf '%q ' "$@"; echo; else "$@"; fi; }
queue() { do_it gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }
nodes() { if ((slices == 1)); then echo "$NAME"; else for ((i = 0; i < slices; i++)); do echo "$NAME-$i"; done; fi; }
everywhere() {  # command on all workers of all slices at once
  local pids=() node
  for node in $(nodes); do
    do_it gcloud compute tpus tpu-vm ssh "$node" --zone="$ZONE" --worker=all --command="$1" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid"; done
}

case $action in
  create)
    which=(--node-id="$NAME")
    ((slices == 1)) || which=(--node-prefix="$NAME" --node-count="$slices")
    queue create "${which[@]}" --accelerator-type="${TYPE:?}" --runtime-version="${RUNTIME:?}" ${SPOT:+--spot} ;;
  state) queue describe ;;
  setup) everywhere "git clone --depth=1 $(printf %q "${1:?the repository}") llm && cd llm && ${PYTHON:-python3} -m venv .venv && \
.venv/bin/pip install --quiet --constraint constraints.txt --editable '.[tpu]'" ;;
  run)
    : "${1:?a command}"
    command="export PATH=\$PWD/.venv/bin:\$PATH JAX_COORDINATOR_ADDRESS=auto JAX_PLATFORMS=tpu,cpu; quick=0; \
until SECONDS=0; $(printf '%q ' "$@"); do code=\$?; quick=\$((SECONDS < 600 ? quick + 1 : 0)); \
if [[ \$code = 130 || \$code = 2 || \$quick = 5 ]]; then echo ended with exit code \$code; exit \$code; fi; \
echo exit code \$code, again in 30 s; sleep 30; done"
    everywhere "cd llm && nohup setsid bash -c $(printf %q "$command") > ~/run.log 2>&1 < /dev/null &" ;;
  logs)
    do_it gcloud compute tpus tpu-vm ssh "$(nodes | head -n 1)" --zone="$ZONE" --worker=0 \
      --command="tail -n +1 -f ~/run.log" ;;
  stop) everywhere "pkill -TERM -f '[-]m experiments' || true" ;;
  delete) queue delete --force --quiet ;;
  *) echo "error: $action is not one of create, state, setup, run, logs, stop, delete" >&2; exit 2 ;;
esac
