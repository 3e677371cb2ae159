"""Train a memory transformer, see memformer_dist/commands/train.py or --help.

deepspeed launch/train.py --config configs/base.json --run-dir runs/base
"""

from memformer_dist.commands.train import run

if __name__ == "__main__":
    run()
