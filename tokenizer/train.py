"""Train a tokenizer: `python tokenizer/train.py --help`. The program is memformer_dist/commands/train_tokenizer.py."""

from memformer_dist.commands.train_tokenizer import main
from memformer_dist.errors import run_program

if __name__ == "__main__":
    run_program(main)
