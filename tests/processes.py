"""Scripts in several processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def launch(processes, script, *arguments):
    """Run a script in one process, or in several over gloo; returns what subprocess does."""
    command = [sys.executable]
    if processes > 1:
        with socket.socket() as free:
            free.bind(('127.0.0.1', 0))
            port = free.getsockname()[1]
        command += ['-m', 'torch.distributed.run', '--master_addr=127.0.0.1']
        command += [f'--master_port={port}', f'--nproc_per_node={processes}']
    return subprocess.run(
        [*command, str(script), *map(str, arguments)],
        env=os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1'),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
