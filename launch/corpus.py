"""Verify or show a corpus: `python launch/corpus.py --help`. The program is memformer_dist/commands/corpus.py."""

from memformer_dist.commands import run_corpus as run

if __name__ == "__main__":
    run()
