"""Turn text into a corpus: `python tokenizer/shard.py --help`. The program is memformer_dist/commands/prepare.py."""

from memformer_dist.commands.prepare import main
from memformer_dist.errors import run_program

if __name__ == "__main__":
    run_program(main)
