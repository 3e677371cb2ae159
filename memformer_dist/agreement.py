"""What all ranks must share, compared once before the work: settings, data, versions, code and the run's folder.

    agreement.require_run(world, config, corpora, run_dir)      # training
    agreement.require(world, agreement.software() | ...)        # any facts

Ranks on machines of their own may see another corpus, another run's folder or another installation than rank 0 does.
Such a run would train for some steps and then hang, fail at its first save, or train on with weights that drift apart.
So each rank states facts, texts by name; they are gathered, and where one of them differs every rank raises the same
message, which names the ranks, their hosts and what differs.

That the run's folder is one and the same is tried: rank 0 writes a file into it, and every rank reads that.
"""

import hashlib
import json
import platform
import secrets
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import memformer_dist
from memformer_dist.config import RunConfig
from memformer_dist.data.dataset import TokenDataset
from memformer_dist.errors import LaunchError, UserError
from memformer_dist.files import sha256_of, write_text
from memformer_dist.places import configured
from memformer_dist.world import World, ranks_on_hosts

Facts = dict[str, str]

PACKAGES = ("deepspeed", "numpy", "safetensors")  # that take part in the numbers, beside torch
# Places on a machine, which may have other names on another one: what lies there is compared instead.
PLACES = ("data.corpus", "data.cache", "training.init_from")
TOKEN = ".agreement-"  # how the file is called that rank 0 writes, with a random ending
PATIENCE_S = 5.0  # until a network file system shows what another machine has written
DIFFERENCES_SHOWN = 12
VALUE_SHOWN = 200  # characters


def require_run(world: World, config: RunConfig, corpora: tuple[TokenDataset, TokenDataset], run_dir: Path) -> None:
    """Compare all that the ranks of a run must share. A collective call; raises LaunchError as `require` does."""
    source = "data.task" if config.data.task else "data.corpus"
    train, valid = (documents(f"{source}, {name}", x) for name, x in zip(("train", "valid"), corpora, strict=True))
    require(world, settings(config) | train | valid | software(), run_dir)


def require(world: World, facts: Mapping[str, str], run_dir: Path | None = None) -> None:
    """Compare facts over all ranks. A collective call, which ranks with other facts, or more of them, take part in too.

    Args:
        run_dir: a folder that must be the same on all ranks, as must be the newest checkpoint in it.

    Raises LaunchError, on all ranks, if something differs.
    """
    if world.size == 1:
        return
    folder: Facts = {}
    if run_dir is not None:
        token, _, newest = (_from_main(world, run_dir) or "").partition("\n")
        folder = _run_dir_facts(run_dir, token, newest)
    stated = {"host": socket.gethostname(), "facts": folder | dict(facts)}
    found = [json.loads(text) for text in world.gather(json.dumps(stated))]
    if run_dir is not None and world.is_main:
        with suppress(OSError):
            (run_dir / token).unlink()
    problems = list(differences([each["facts"] for each in found], [each["host"] for each in found]))
    if problems:
        shown, left = problems[:DIFFERENCES_SHOWN], len(problems) - DIFFERENCES_SHOWN
        raise LaunchError(
            "\n  ".join(["the ranks differ in what all of them must share:", *shown])
            + (f"\n  and {left} more" if left > 0 else "")
        )


def differences(facts: Sequence[Mapping[str, str]], hosts: Sequence[str]) -> Iterator[str]:
    """What is not the same in the facts of all ranks, one sentence each: the values, and which ranks have them."""
    for name in dict.fromkeys(name for each in facts for name in each):
        ranks: dict[str, list[int]] = {}
        for rank, each in enumerate(facts):
            ranks.setdefault(each.get(name, "nothing"), []).append(rank)
        if len(ranks) > 1:
            yield f"{name}: found " + ", ".join(
                f"{_shortened(value)} on {ranks_on_hosts(having, hosts)}" for value, having in ranks.items()
            )


def _shortened(value: str) -> str:
    return value if len(value) <= VALUE_SHOWN else f"{value[:VALUE_SHOWN]} ..."


# ---- facts -----------------------------------------------------------------------------------------------------------


def software() -> Facts:
    """Versions of what takes part in the numbers, and the sha256 of each source file of memformer_dist."""
    facts = {"version of python": platform.python_version(), "version of torch": str(torch.__version__)}
    for name in PACKAGES:
        try:
            facts[f"version of {name}"] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[f"version of {name}"] = "nothing"
    facts["version of memformer_dist"] = memformer_dist.__version__
    root = Path(memformer_dist.__file__).parent
    for path in sorted(root.rglob("*.py")):
        facts[f"source memformer_dist/{path.relative_to(root).as_posix()}"] = f"sha256 {sha256_of(path)[:12]}"
    return facts


def settings(config: RunConfig) -> Facts:
    """Every field of the resolved configuration, but for places on this machine; the checkpoint of init_from."""
    facts = {name: text for name, text in _fields("", json.loads(config.to_json())) if name not in PLACES}
    if config.training.init_from:
        facts |= manifest("training.init_from", _newest(Path(configured(config.training.init_from))))
    return facts


def _fields(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and value and name not in PLACES:
        for key, inner in value.items():
            yield from _fields(f"{name}.{key}" if name else key, inner)
    else:
        yield name, json.dumps(value)


def documents(name: str, dataset: TokenDataset) -> Facts:
    """The content of a split, and of the tokenizer that it was made with; `name` is what messages call it."""
    return {
        name: f"fingerprint {dataset.fingerprint[:12]}",
        f"tokenizer of {name}": f"sha256 {dataset.vocabulary.tokenizer_sha256[:12]}",
    }


def manifest(name: str, path: Path | None) -> Facts:
    """The checkpoint `path`; `name` is what messages call it."""
    return {name: _checkpoint(path)}


def _checkpoint(path: Path | None) -> str:
    """A checkpoint's manifest, which has the sha256 of all its files."""
    try:
        return "no checkpoint" if path is None else f"{path.name}, sha256 {_sha256(path / 'manifest.json')}"
    except OSError:
        return "no checkpoint"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def _newest(path: Path) -> Path | None:
    """The checkpoint `path`, or the newest one of the run in `path`; not verified."""
    if (path / "checkpoint.json").exists():
        return path
    return max(path.glob("checkpoints/step-[0-9]*"), default=None)


# ---- the run's folder ------------------------------------------------------------------------------------------------


def _from_main(world: World, run_dir: Path) -> str | None:
    """The token that rank 0 writes into the folder, and the name of the newest checkpoint there; on all ranks."""
    return world.broadcast_first(world.on_all_or_raise(lambda: _write_token(run_dir) if world.is_main else None))


def _write_token(run_dir: Path) -> str:
    name = TOKEN + secrets.token_hex(8)
    try:
        for left_over in run_dir.glob(f"{TOKEN}*"):  # of a start that was killed
            left_over.unlink(missing_ok=True)
        write_text(run_dir / name, name)
    except OSError as error:
        raise UserError(f"--run-dir: cannot write to {run_dir}: {error.strerror}") from None
    newest = _newest(run_dir)
    return f"{name}\n{newest.name if newest else ''}"


def _run_dir_facts(run_dir: Path, token: str, newest: str) -> Facts:
    """Whether this is the folder that rank 0 wrote to, and its checkpoint `newest` as it is seen from here.

    The checkpoint is looked up by its name: a network file system may list a folder as it was some time ago.
    """
    if not _appears(run_dir / token):
        return {"--run-dir": f"another folder ({run_dir.resolve()})"}
    found = "the folder that rank 0 writes to"
    if newest:
        path = run_dir / "checkpoints" / newest
        _appears(path / "manifest.json")
        found += f" with {_checkpoint(path)}"
    return {"--run-dir": found}


def _appears(path: Path) -> bool:
    """Whether a file can be read, now or soon."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        with suppress(OSError):
            path.read_bytes()
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
