"""Verify or show a corpus: `python launch/corpus.py --help`. The program is memformer_dist/commands/corpus.py."""

from memformer_dist.commands.corpus import main
from memformer_dist.errors import run_program

if __name__ == "__main__":
    run_program(main)
