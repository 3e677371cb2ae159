"""Continue a prompt with a trained model, see memformer_dist/commands/generate.py or --help.

python launch/generate.py --run-dir runs/small --prompt "It was a dark" --tokens 200
"""

from memformer_dist.commands.generate import run

if __name__ == "__main__":
    run()
