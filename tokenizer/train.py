"""Train a tokenizer: `python tokenizer/train.py --help`. The program is memformer_dist/commands/train_tokenizer.py."""

from memformer_dist.commands import run_train_tokenizer as run

if __name__ == "__main__":
    run()
