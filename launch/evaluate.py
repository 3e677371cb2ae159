"""Held-out losses of a trained model. --help shows more examples.

    python launch/evaluate.py --run-dir runs/small

The program is memformer_dist/commands/evaluate.py.
"""

from memformer_dist.commands import run_evaluate as run

if __name__ == "__main__":
    run()
