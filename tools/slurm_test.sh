#!/usr/bin/env bash
# Test as a Slurm job, as slurm_train.sh trains.
#
#     tools/slurm_test.sh PARTITION JOB_NAME CONFIG CHECKPOINT [ARGUMENTS OF test.py]
set -euo pipefail
if [ $# -lt 4 ]; then
    sed -n '2,4s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
TOOL=test exec "$(dirname "${BASH_SOURCE[0]}")/slurm_train.sh" "$@"
