#!/usr/bin/env bash
# launch/gke/submit.sh COMMAND...: a JobSet on GKE, one Job a TPU slice, one Pod a host (see launch/README.md).
# Required: NAME, IMAGE, ACCELERATOR (tpu-v5-lite-podslice, tpu-v5p-slice, tpu-v6e-slice), TOPOLOGY (16x16), HOSTS of a
# slice (64). SLICES=1; CHIPS=4 of a host; RESTARTS=10; DRY_RUN=1 prints the manifest.
set -euo pipefail
: "${1:?a command}" "${NAME:?}" "${IMAGE:?}" "${ACCELERATOR:?}" "${TOPOLOGY:?}" "${HOSTS:?hosts of one slice}"
export NAME IMAGE ACCELERATOR TOPOLOGY HOSTS SLICES=${SLICES:-1} CHIPS=${CHIPS:-4} RESTARTS=${RESTARTS:-10}
COMMAND=$(python3 -c 'import json, sys; print(json.dumps(sys.argv[1:]))' "$@")
export COMMAND
fill='import os, string, sys; sys.stdout.write(string.Template(sys.stdin.read()).substitute(os.environ))'
if [[ -n ${DRY_RUN:-} ]]; then apply=(cat); else apply=(kubectl apply -f -); fi
python3 -c "$fill" < "$(dirname "$0")/jobset.yaml" | "${apply[@]}"
