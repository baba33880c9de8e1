"""Put LLaVA-1.5-7B together as it is before visual instruction tuning.

python projects/llava/assemble.py mm_projector.bin --out data/llava/vicuna-7b-clip336
"""

from llava_tuning.assembly import main

from mmpeft.engine.command_line import run

if __name__ == '__main__':
    run(main)
