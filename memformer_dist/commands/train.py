"""Train a memory transformer. The same command starts a run, resumes it, or finds it finished.

    deepspeed launch/train.py --config configs/base.json --run-dir runs/base
    deepspeed --num_gpus 2 launch/train.py --config configs/base.json --set mrbp.window=64 --set training.seed=1
    deepspeed launch/train.py --resume runs/base                  # with the settings of its latest start
    deepspeed launch/train.py --resume runs/base --set training.tokens=2000000000
    torchrun --nproc-per-node 2 launch/train.py --config configs/small.json
    python launch/train.py --config configs/small.json            # one process
    memformer-train --config small                                # the same, installed
    torchrun --nproc-per-node 2 -m memformer_dist.commands.train --config small

Without a GPU: DS_ACCELERATOR=cpu deepspeed --num_gpus 2 launch/train.py ... starts two CPU ranks.

Stop a run with `touch RUN/stop`, or with SIGTERM, SIGINT, SIGHUP, SIGUSR1, SIGUSR2 or SIGXCPU to any of its ranks: it
finishes the step, saves a checkpoint and ends with exit code 75, "start the same command again"; a finished run ends
with 0. A second signal ends it at once, without saving. Ctrl-C in a terminal and most batch systems signal all
processes, which is fine too. Signals that are ignored when it starts (nohup) stay ignored. Ranks whose launcher has died
stop as well, and under SLURM the run stops before its job ends. Messages also go to RUN/log.txt.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import memformer_dist
from memformer_dist import logs, orphans, signals
from memformer_dist.commands.options import Options, nonempty_path, nonempty_path_or_url
from memformer_dist.errors import STOPPED, Stopped, UserError, run_program
from memformer_dist.files import expect_writable
from memformer_dist.places import Places

if TYPE_CHECKING:
    from memformer_dist.config import RunConfig
    from memformer_dist.world import World

CONFIG = "config.json"  # in a run's folder: the settings of its latest start


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Raises UserError."""
    parser = Options(__doc__)
    settings = parser.add_mutually_exclusive_group(required=True)
    settings.add_argument(
        "--config",
        type=parser.collecting("--config", nonempty_path_or_url),
        help="a JSON file, or the name of a configuration in configs/",
    )
    settings.add_argument(
        "--resume",
        type=parser.collecting("--resume", nonempty_path),
        metavar="RUN",
        help="continue the run in this folder, with the settings of its latest start; takes the place of --config and"
        " --run-dir, and --set may change what a resumed run may change",
    )
    parser.add_argument(
        "--run-dir", type=nonempty_path, help="the run's folder (default: runs/NAME of the configuration)"
    )
    parser.add_overrides()
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # of DeepSpeed's launcher, which sets LOCAL_RANK too
    options = parser.parse_args(arguments)
    if options.resume is not None and options.run_dir is not None:
        parser.error("argument --run-dir: not allowed with argument --resume, which names the run's folder")
    options.run_dir = options.resume or options.run_dir or Path("runs") / Path(options.config).stem
    return options


def main(arguments: list[str] | None = None) -> None:
    """Raises UserError, and Stopped if the run was stopped before its end."""
    _train(parse(arguments))


def run() -> None:
    signals.note_stop_requests()
    orphans.stop_with_launcher()
    logs.survive_lost_output()
    try:
        options = parse(None)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    is_run = options.resume is None or (options.resume / CONFIG).exists()  # else nothing is written there
    run_program(lambda: _train(options), error_log=options.run_dir / logs.FILE if is_run else None)


def _train(options: argparse.Namespace) -> None:
    # Imported once signals are heard: torch takes seconds. DeepSpeed also wants to know the device first.
    from memformer_dist.data.open_data import open_data
    from memformer_dist.launcher import detected, several_ranks_can_meet
    from memformer_dist.world import World

    def load() -> "RunConfig":
        return load_config(options, detected().size)

    if not several_ranks_can_meet():
        load()  # a mistake is reported before any device is touched
    world = World.start()
    config = world.on_all_or_raise(load)  # what one rank finds must reach the others: they would wait for it
    world.on_all_or_raise(lambda: start_log(world, options.run_dir))
    corpora = world.on_all_or_raise(lambda: open_data(config.data, Places.of_run(options.run_dir)))
    from memformer_dist.train import train

    stopped = train(config, options.run_dir, corpora, world) is None
    code = code_of_a_stopped_run() if stopped else 0
    signals.everything_is_saved(code)
    if stopped:
        raise Stopped(exit_code=code)


def code_of_a_stopped_run() -> int:
    """STOPPED; 0 where torchrun would take any other code for a failure and start the ranks again (--max-restarts)."""
    restarts, limit = (int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return STOPPED if restarts >= limit else 0


def start_log(world: "World", run_dir: Path) -> None:
    """Log to RUN/log.txt. Raises UserError if it cannot be written."""
    expect_writable(run_dir / logs.FILE, "--run-dir")
    logs.start(world.rank, run_dir / logs.FILE)


def load_config(options: argparse.Namespace, world_size: int) -> "RunConfig":
    """The settings of the run, by --config or --resume, and --set.

    Raises UserError, also where --set would change what a resumed run may not change.
    """
    from memformer_dist.config import RunConfig

    places = Places.of_run(options.run_dir)
    if options.resume is None:
        return RunConfig.load(find_config(options.config), options.set, world_size, places)
    recorded = options.resume / CONFIG
    if not recorded.is_file():
        raise UserError(f"--resume: found no {recorded}, expected the folder of a run")
    config = RunConfig.load(recorded, options.set, world_size, places)
    config.changes_since(RunConfig.recorded(recorded))
    return config


def find_config(name: str) -> Path:
    """The file `name`; or, if there is none, the configuration that is called `name` or `configs/name.json`.

    Raises UserError if there is neither.
    """
    path = Path(name)
    if path.exists():
        return path
    configurations = {file.stem: file for file in sorted(configs_folder().glob("*.json"))}
    spellings = (Path(path.stem), Path(f"{path.stem}.json"), Path(f"configs/{path.stem}.json"))
    if path in spellings and path.stem in configurations:
        return configurations[path.stem]
    raise UserError(
        f"--config: found no file {name}, expected a file or one of the configurations {', '.join(configurations)}"
    )


def configs_folder() -> Path:
    """configs/: inside the installed package, or in the clone."""
    package = Path(memformer_dist.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


if __name__ == "__main__":
    run()
