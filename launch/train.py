"""Train a memory transformer. --help shows more examples.

    deepspeed launch/train.py --config configs/base.json --run-dir runs/base

The program is memformer_dist/commands/train.py.
"""

from memformer_dist.commands import run_train as run

if __name__ == "__main__":
    run()
