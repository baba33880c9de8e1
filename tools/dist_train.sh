#!/usr/bin/env bash
# Train in several processes on one or more nodes: one a GPU, or on CPUs as many as asked for.
#
#     tools/dist_train.sh CONFIG GPUS [ARGUMENTS OF train.py]
#
# Environment: PORT, MASTER_ADDR; with several nodes NNODES and NODE_RANK.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
config=$1
gpus=$2
shift 2
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python}" -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$gpus" \
    "$here/${TOOL:-train}.py" "$config" "$@" --launcher pytorch
