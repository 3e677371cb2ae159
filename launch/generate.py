"""Continue a prompt with a trained model. --help shows more examples.

    python launch/generate.py --run-dir runs/small --prompt "It was a dark" --tokens 200

The program is memformer_dist/commands/generate.py.
"""

from memformer_dist.commands import run_generate as run

if __name__ == "__main__":
    run()
