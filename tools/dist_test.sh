#!/usr/bin/env bash
# Test in several processes, as dist_train.sh trains.
#
#     tools/dist_test.sh CONFIG CHECKPOINT GPUS [ARGUMENTS OF test.py]
set -euo pipefail
if [ $# -lt 3 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
TOOL=test exec "$(dirname "${BASH_SOURCE[0]}")/dist_train.sh" "$1" "$3" "$2" "${@:4}"
