"""Does a cell remember? --help shows more examples.

    python launch/prove.py --task needle --cell memformer --segments 32

The program is memformer_dist/commands/prove.py.
"""

from memformer_dist.commands import run_prove as run

if __name__ == "__main__":
    run()
