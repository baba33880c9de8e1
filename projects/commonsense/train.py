"""Train a method on commonsense_170k.

python projects/commonsense/train.py projects/commonsense/configs/liera_r16_llama_7b.py
"""

from commonsense.training import main

from mmpeft.engine.command_line import run

if __name__ == '__main__':
    run(main)
