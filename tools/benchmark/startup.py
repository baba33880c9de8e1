"""Start-up: what importing mmpeft takes, in Python processes of their own."""

import subprocess
import sys
import time
from functools import partial

from rounds import Phases

TEXT = 'start-up of Python with'
BASE = 'import torch, mmengine'
STATEMENTS = ('pass', 'import torch', BASE, 'import mmpeft', 'import mmpeft.models')


def entries(*_) -> dict:
    """A process for each statement."""
    return {statement: partial(execute, statement) for statement in STATEMENTS}


def execute(statement: str) -> Phases:
    """Seconds of a Python process."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, '-c', statement], check=True)
    return dict(process=time.perf_counter() - begin)
