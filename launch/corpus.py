"""Verify or show a corpus: `python launch/corpus.py --help`. The program is memformer_dist/commands/corpus.py."""

from memformer_dist.commands.corpus import run

if __name__ == "__main__":
    run()
