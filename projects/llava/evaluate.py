"""Answer questions on images with the adapter of a run, and count exact answers.

    python projects/llava/evaluate.py work_dirs/llava/flora_r128_llava_7b \
        --data questions.json --images images
"""

from llava_tuning.evaluation import main

from mmpeft.engine.command_line import run

if __name__ == '__main__':
    run(main)
