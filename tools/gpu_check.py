"""Check mmpeft on a GPU, within 9 minutes on an H100, and write one JSON file.

    python tools/gpu_check.py                      # again, to go on with what was left out
    python tools/gpu_check.py --device cpu --quick # whether the check itself runs

It needs torch, timm and mmengine; weights in few bits need torchao, and the comparison with peft
needs peft. docs/performance.md says what is checked.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = ROOT / 'projects/benchmark'
if not BENCHMARK.is_dir():
    sys.exit(f'gpu_check.py: {BENCHMARK} does not exist. Run it in a checkout of the repository.')
sys.path[:0] = [str(ROOT), str(BENCHMARK)]

from checks import main  # noqa: E402

from mmpeft.engine.command_line import run  # noqa: E402

if __name__ == '__main__':
    run(lambda: sys.exit(main() > 0))
