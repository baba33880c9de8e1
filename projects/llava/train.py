"""Tune LLaVA on conversations on images.

python projects/llava/train.py projects/llava/configs/flora_r128_llava_7b.py
"""

from llava_tuning.training import main

from mmpeft.engine.command_line import run

if __name__ == '__main__':
    run(main)
