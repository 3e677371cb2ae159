"""Train a memory transformer; the same command starts a run, resumes it, or finds it finished.

    deepspeed launch/train.py --config configs/base.json --run-dir runs/base
    deepspeed --num_gpus 2 launch/train.py --config configs/base.json --set mrbp.window=64 --set optimizer.learning_rate=1e-4
    torchrun --nproc-per-node 2 launch/train.py --config configs/small.json
    python launch/train.py --config configs/small.json            # one process

Without a GPU: DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.py ... starts two CPU ranks.
A run is stopped by SIGTERM, SIGINT or SIGUSR1 to any of its ranks, or by `touch RUN/stop`: it saves a checkpoint and ends
with exit code 0. A SIGTERM to the `deepspeed` command alone ends that command and leaves the ranks running.
"""

import argparse
from pathlib import Path

from memformer_dist.config import RunConfig
from memformer_dist.data.open_data import open_data
from memformer_dist.errors import run_program
from memformer_dist.world import World, world_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a JSON file of configs/")
    parser.add_argument("--run-dir", type=Path, help="where the run lives (default: runs/NAME of the configuration)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override a field")
    parser.add_argument(
        "--local_rank", help=argparse.SUPPRESS
    )  # given by DeepSpeed's launcher, which sets LOCAL_RANK too
    arguments = parser.parse_args()
    run_dir = arguments.run_dir or Path("runs") / arguments.config.stem

    def program() -> None:
        config = RunConfig.load(arguments.config, arguments.set, world_size())
        world = World.start()
        corpora = world.on_all_or_raise(lambda: open_data(config.data))
        from memformer_dist.train import train  # imports deepspeed, which wants to know the device and takes seconds

        train(config, run_dir, corpora, world)

    run_program(program, error_log=run_dir / "errors.log")


if __name__ == "__main__":
    main()
