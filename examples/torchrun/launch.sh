#!/usr/bin/env bash
# HEAD=HOST:PORT NODES=2 launch.sh CONFIG [KEY=VALUE]...
#
# A whole run on several nodes that no queue starts. Give the same command on each. All of them need the same files in
# the same places: the model, the text, and the run's folder.
#
#   HEAD     one of the nodes, and a port on it; the next port is used too
#   NODES    how many nodes there are (1)
#   GPUS     processes of a node, one for each GPU (8)
#   ADDRESS  of this node, where the others do not reach it by its name
#   RESTARTS how often the processes are started again when one of them dies, or when a node comes back (3)
#
# Each process trains at least one block of stage 1, so GPUS times NODES must not exceed the number of blocks. Whatever
# is interrupted goes on from its last checkpoints when the same command is given again.
set -euo pipefail

if [ $# -lt 1 ] || [ -z "${HEAD:-}" ]; then
    sed -n '2s/^# //p' "$0" >&2
    exit 2
fi
host=${HEAD%:*} port=${HEAD##*:}

together() { # PORT WORDS...: one process for each GPU of all nodes
    torchrun \
        --nnodes="${NODES:-1}" \
        --nproc-per-node="${GPUS:-8}" \
        --rdzv-id="lolcats-$1" \
        --rdzv-backend=c10d \
        --rdzv-endpoint="$host:$1" \
        --rdzv-conf=read_timeout=600 \
        --max-restarts="${RESTARTS:-3}" \
        ${ADDRESS:+--local-addr="$ADDRESS"} \
        -m lolcats "${@:2}"
}

together "$port" block "$@"
together "$((port + 1))" linearize "$@" --resume
