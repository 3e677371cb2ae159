"""Held-out losses of a trained model, see memformer_dist/commands/evaluate.py or --help.

python launch/evaluate.py --run-dir runs/small
"""

from memformer_dist.commands.evaluate import run

if __name__ == "__main__":
    run()
