"""One corpus after another: what is learned, and what is forgotten. --help shows more examples.

    python launch/continual.py --config configs/quickstart.json --corpora corpora/books corpora/code

The program is memformer_dist/commands/continual.py.
"""

from memformer_dist.commands import run_continual as run

if __name__ == "__main__":
    run()
