#!/usr/bin/env bash
# Run lampctl in Docker until it is done, whatever happens to the container in between:
#   ./docker-loop.sh facebook/opt-1.3b --sparsity 0.7
set -uo pipefail

image=${IMAGE:-lampctl}
volume=${VOLUME:-lampctl}

while true; do
    docker run --rm --init=false --gpus all --shm-size 1g --volume "$volume:/work" --env HF_TOKEN \
        "$image" run "$@" --run-dir runs/job
    code=$?
    case $code in
        75 | 137 | 143) echo "stopped with $code: going on in 10 seconds (Ctrl-C ends it)" >&2 && sleep 10 ;;
        *) exit $code ;;
    esac
done
