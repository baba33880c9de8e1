#!/usr/bin/env bash
# Install the pinned stack of requirements/ and mmpeft itself (editable).
#
#     requirements/install.sh VENV
#
# Called by the Makefile. Safe to repeat and to interrupt: what is there is
# kept, what is missing is added. Environment:
#   PYTHON          interpreter that makes the environment (3.10 to 3.12)
#   PIP_FIND_LINKS  folders with wheels, for instance a compiled onedl-mmcv
#   MAX_JOBS        compilers that run at once (default: by cores and memory)
#   FORCE_CUDA=1    compile mmcv's CUDA operators on a machine without a GPU
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$(realpath -ms "${1:?usage: requirements/install.sh VENV}")
py=$venv/bin/python
pip=(env PIP_USER=0 "$py" -m pip --disable-pip-version-check)

say() { printf '\n== %s\n' "$*"; }
die() { printf '\nerror: %s\n' "$*" | fold -s -w 80 >&2; exit 1; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3.12 python3.10 python3}; do
        "$candidate" -c 'import ensurepip, sys, venv
sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo "$candidate" && return
    done
    die "${PYTHON:-none of python3.11, python3.12, python3.10 and python3} is not a Python" \
        "3.10 to 3.12 with its venv module. Install one (on Debian and Ubuntu:" \
        "apt install python3-venv python3-dev) or name one: make install PYTHON=/path/to/python3.11"
}

# 'cuda' when the operators of mmcv can be compiled for it and used, else 'cpu'.
mmcv_operators() {
    "$py" - <<'EOF'
import os, subprocess, sys
import torch

if not (torch.cuda.is_available() or os.environ.get('FORCE_CUDA') == '1'):
    sys.exit(print('cpu'))
from torch.utils.cpp_extension import CUDA_HOME

version = torch.version.cuda or 'none'
found = subprocess.getoutput(f'"{CUDA_HOME}/bin/nvcc" --version')
if f'release {version.split(".")[0]}.' in found:
    sys.exit(print('cuda'))
print(f'warning: no nvcc of CUDA {version} was found for the GPU, so mmcv gets operators for the '
      'CPU only. To train on the GPU install its toolkit, set CUDA_HOME to it and run '
      '`make reinstall`.', file=sys.stderr)
print('cpu')
EOF
}

# Is the mmcv that is installed the pinned one, with operators that load?
mmcv_works() {
    "$py" - "$1" >/dev/null 2>&1 <<'EOF'
import importlib.metadata, sys
import mmcv.ops

assert f"=={importlib.metadata.version('onedl-mmcv')}\n" in open('requirements/mmcv.txt').read()
assert sys.argv[1] == 'cpu' or mmcv.ops.get_compiling_cuda_version() != 'not available'
EOF
}

try_wheel() {
    local ops=$1
    shift
    "${pip[@]}" install --no-deps --only-binary :all: --force-reinstall "$@" && mmcv_works "$ops"
}

# From a wheel where there is one (kept from before, PIP_FIND_LINKS, the
# index), else compiled. Wheels are kept by torch version and operators, which
# pip's own cache does not tell apart.
install_mmcv() {
    local ops jobs store log headers
    ops=$(mmcv_operators)
    mmcv_works "$ops" && return
    store=${XDG_CACHE_HOME:-$HOME/.cache}/mmpeft/mmcv-$(sed -n 's/.*==//p' requirements/mmcv.txt)-$(
        "$py" -c "import torch, sys; print(sys.implementation.cache_tag, torch.__version__, sep='-')"
    )-$ops
    mkdir -p "$store" 2>/dev/null || store=$venv/mmcv
    log=$venv/mmcv.log
    try_wheel "$ops" "$store"/*.whl >"$log" 2>&1 && return
    try_wheel "$ops" -r requirements/mmcv.txt >"$log" 2>&1 && return

    headers=$("$py" -c 'import sysconfig; print(sysconfig.get_path("include"))')
    command -v "${CXX:-c++}" >/dev/null && [ -e "$headers/Python.h" ] ||
        die "mmcv has to be compiled, and a C++ compiler or the headers of Python are missing." \
            "Install both (on Debian and Ubuntu: apt install g++ python3-dev) and run this again."
    # 2 GB a compiler; nproc without the limit that `make test` may have set.
    jobs=${MAX_JOBS:-$(awk -v cores="$(env -u OMP_NUM_THREADS nproc)" '/MemAvailable/ {
        n = int($2 / 2e6); if (n > cores) n = cores; print n < 1 ? 1 : n }' /proc/meminfo)}
    say "Compiling mmcv for $ops with $jobs compilers at once; no wheel was found." \
        "On 2 cores this takes about 15 minutes (for cuda an hour), once: the wheel is kept in" \
        "$store. All output goes to $log"
    # Without nvcc a visible GPU would make mmcv's build ask for it.
    [ "$ops" = cuda ] || export CUDA_VISIBLE_DEVICES= FORCE_CUDA=0
    # -g0: without debug symbols, which make up most of the file. Not in CFLAGS,
    # which would take the place of the flags of Python's own build, -O3 among them.
    MMCV_WITH_OPS=1 MAX_JOBS=$jobs CPPFLAGS='-g0' \
        "${pip[@]}" wheel -v --no-deps --no-build-isolation --no-cache-dir --no-binary :all: \
        --wheel-dir "$store" -r requirements/mmcv.txt 2>&1 | tee "$log" |
        awk 'match($0, /\[[0-9]+\/[0-9]+\]/) { split(substr($0, RSTART + 1, RLENGTH - 2), n, "/")
            if (n[1] % 5 == 0 || n[1] == n[2]) {
                printf "   %d of %d files compiled\n", n[1], n[2]; fflush() } }' ||
        die "mmcv did not compile. The end of $log: $(tail -n 5 "$log")"
    try_wheel "$ops" "$store"/*.whl || die "mmcv compiled but its operators do not load:" \
        "$("$py" -c 'import mmcv.ops' 2>&1 | tail -n 1)"
}

if ! "$py" -m pip --version >/dev/null 2>&1; then
    python=$(find_python)
    say "Creating $venv with $("$python" --version)"
    rm -rf "$venv"/lib/python3*/site-packages/pip{,-*}  # half of one, left by an interruption
    "$python" -m venv "$venv"
fi
# An interrupted pip leaves packages that lack files but look installed: it
# writes INSTALLER after a package's own files.
for info in "$venv"/lib/python3*/site-packages/*.dist-info; do
    [ -e "$info/INSTALLER" ] || rm -rf "$info"
done
say 'Installing the packages of requirements/ (about 2.5 GB to download, 6 GB on disk, minutes)'
"${pip[@]}" install -q --no-deps -r requirements/build.txt
"${pip[@]}" install --no-deps --only-binary :all: \
    -r requirements/runtime.txt -r requirements/dev.txt -r requirements/docs.txt \
    -r requirements/benchmark.txt -r requirements/projects.txt
"${pip[@]}" install --no-deps --no-build-isolation -r requirements/openmmlab.txt
install_mmcv
PYTHONWARNINGS=ignore "${pip[@]}" install -q --no-deps --no-build-isolation --editable .
"$py" -W ignore - >/dev/null <<'EOF' || die "The packages are there but do not import;" \
    "\`make reinstall\` starts anew."
import cv2, timm
import mmcv.ops, mmdet.apis, mmrotate.apis, mmrotate.datasets, mmrotate.models, mmseg.apis
import mmpeft
EOF
say "Installed into $venv. Activate it: . $venv/bin/activate"
