"""Turn text into a corpus: `python tokenizer/shard.py --help`. The program is memformer_dist/commands/prepare.py."""

from memformer_dist.commands import run_prepare as run

if __name__ == "__main__":
    run()
