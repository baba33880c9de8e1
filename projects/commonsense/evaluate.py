"""Answer the eight test sets with the adapter of a run, and print its row of the table.

python projects/commonsense/evaluate.py work_dirs/commonsense/liera_r16_llama_7b
"""

from commonsense.evaluation import main

from mmpeft.engine.command_line import run

if __name__ == '__main__':
    run(main)
