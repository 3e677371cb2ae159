"""Two ranks that do not share what they must: real runs, each rank with an environment of its own.

On the commit before, ranks with other settings or corpora trained some steps and then hung or failed at the first save,
or trained on with weights that differed; a mistake of the second rank alone left the first waiting without a word.
"""

import json
import os
import shutil
import socket
import tarfile
from pathlib import Path

import pytest

from memformer_dist import agreement
from memformer_dist.agreement import differences
from memformer_dist.errors import LaunchError
from memformer_dist.prepare.build import shard
from tests.helpers import ROOT
from tests.helpers.files import flip
from tests.helpers.ranks import free_port, run_ranks
from tests.helpers.scripts import run_ranks_of_script

HOST = socket.gethostname()
FIRST, SECOND = f"rank 0 on {HOST}", f"rank 1 on {HOST}"


def two_ranks(*commands: tuple, cold: bool = False, second: dict[str, str] | None = None) -> list:
    """Run a command per rank, as two machines would; `second`: the second one's environment."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "LOCAL_WORLD_SIZE": "2"}

    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} | ((second or {}) if rank else {}) for rank in range(2)]
    return run_ranks_of_script(list(commands), [shared | each for each in own], cold=cold)


class Runs:
    """A configuration and a run directory for each of two ranks: at first the same ones."""

    def __init__(self, folder: Path, config: dict):
        self.folder = folder
        self.configs, self.run_dirs = [config, json.loads(json.dumps(config))], [folder / "run"] * 2
        self.options: list[list] = [[], []]

    def commands(self) -> list[tuple]:
        words = []
        for rank, config in enumerate(self.configs):
            path = self.folder / f"rank{rank}.json"
            path.write_text(json.dumps(config))
            words.append(("launch/train.py", "--config", path, "--run-dir", self.run_dirs[rank], *self.options[rank]))
        return words

    def message(self, **how) -> str:
        """What both ranks say as they end; nothing was trained."""
        done = two_ranks(*self.commands(), **how)
        for each in done:
            assert each.returncode == 2, each.stderr
            assert "Traceback" not in each.stderr
        assert not [path for run_dir in self.run_dirs for path in run_dir.glob("checkpoints/*")]
        assert not [path for run_dir in self.run_dirs for path in run_dir.glob(".agreement*")]
        message = done[0].stderr.partition("error: ")[2]
        assert message
        assert done[1].stderr.partition("error: ")[2] in (message, "")  # rank 0 alone reports what is not a difference
        assert f"error: {message}" in (self.run_dirs[0] / "log.txt").read_text()
        return message


@pytest.fixture
def runs(tmp_path, config) -> Runs:
    return Runs(tmp_path, config)


@pytest.fixture
def other_corpus(corpus_dir, tmp_path) -> Path:
    """Of the same texts with the same tokenizer, but for one byte."""
    texts = Path(shutil.copytree(corpus_dir.parent / "texts", tmp_path / "texts"))
    path = min(texts.iterdir())
    path.write_bytes(b"x" + path.read_bytes()[1:])
    shard(tmp_path / "other", corpus_dir.parent / "small.model", [str(texts)], valid_fraction=0.25)
    return tmp_path / "other"


# ---- what differs is named -------------------------------------------------------------------------------------------


def test_another_corpus(runs, other_corpus):
    """One document differs in one byte: the training split, as it lies there, has another fingerprint."""
    runs.configs[1]["data"]["corpus"] = str(other_corpus)
    message = runs.message()
    assert message.startswith("the ranks differ in what all of them must share:\n  data.corpus, ")
    assert f" on {FIRST}, fingerprint " in message and message.rstrip().endswith(f" on {SECOND}")


def test_a_copy_of_the_corpus_elsewhere_will_do(runs, corpus_dir, tmp_path):
    """The disks of two machines may hold the same corpus under different names."""
    runs.configs[1]["data"]["corpus"] = str(shutil.copytree(corpus_dir, tmp_path / "copy"))
    done = two_ranks(*runs.commands())
    assert [each.returncode for each in done] == [0, 0], done[0].stderr + done[1].stderr
    assert (runs.run_dirs[0] / "summary.json").exists()
    assert not list(runs.run_dirs[0].glob(".agreement*"))


def test_a_corpus_that_one_rank_does_not_have(runs, tmp_path):
    """The other rank must not wait for it."""
    runs.configs[1]["data"]["corpus"] = str(tmp_path / "gone")
    assert f"{SECOND}: " in (message := runs.message()) and f"no token shards in {tmp_path / 'gone'}" in message


def test_another_run_dir(runs, tmp_path):
    runs.run_dirs[1] = tmp_path / "local"
    assert runs.message() == (
        "the ranks differ in what all of them must share:\n  --run-dir: found the folder that rank 0 writes to on"
        f" {FIRST}, another folder ({tmp_path / 'local'}) on {SECOND}\n"
    )


def test_a_run_dir_that_holds_a_copy_of_the_run(trained_run, runs, tmp_path):
    """The same checkpoint is there, but what rank 0 will write is not."""
    runs.run_dirs = [Path(shutil.copytree(trained_run, tmp_path / name)) for name in ("one", "two")]
    for config in runs.configs:
        config["training"]["tokens"] = 900
    done = two_ranks(*runs.commands())
    assert [each.returncode for each in done] == [2, 2], done[0].stderr
    assert f"another folder ({tmp_path / 'two'}) on {SECOND}" in done[0].stderr
    assert "with step-00000005, sha256 " in done[0].stderr


def test_other_settings(runs):
    """Every field that differs is named, whether it comes from the file or from --set."""
    runs.configs[1]["optimizer"]["learning_rate"] = 0.02
    runs.options[1] = ["--set", "training.seed=3"]
    lines = runs.message().splitlines()[1:]
    assert sorted(lines) == [
        f"  optimizer.learning_rate: found 0.01 on {FIRST}, 0.02 on {SECOND}",
        f"  training.seed: found 0 on {FIRST}, 3 on {SECOND}",
    ]


def test_settings_that_one_rank_cannot_read(runs):
    """A mistake of the second rank alone: it reported nothing, and the first waited until it was killed."""
    runs.configs[1]["optimizer"]["learning_rte"] = 0.02
    path = runs.folder / "rank1.json"
    assert runs.message().startswith(f"{SECOND}: {path}: 1 problem\n  optimizer.learning_rte: unknown key")


def test_another_checkpoint_to_start_from(runs, trained_run, tmp_path):
    """training.init_from: a path that holds other weights on the second machine."""
    other = Path(shutil.copytree(trained_run, tmp_path / "other"))
    shutil.rmtree(max((other / "checkpoints").iterdir()))
    for config, run in zip(runs.configs, (trained_run, other), strict=True):
        config["training"]["init_from"] = str(run)
    message = runs.message()
    assert message.count("\n") == 2 and "\n  training.init_from: found step-" in message


@pytest.mark.slow
def test_another_version_and_other_code(runs, tmp_path):
    """Another release of a package, and one line in one file."""
    code = tmp_path / "code"
    shutil.copytree(ROOT / "memformer_dist", code / "memformer_dist")
    with (code / "memformer_dist/zero/engine.py").open("a") as file:
        file.write("# edited\n")
    (code / "deepspeed-0.0.1.dist-info").mkdir()
    (code / "deepspeed-0.0.1.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: deepspeed\nVersion: 0.0.1\n")
    shutil.copytree(ROOT / "launch", code / "launch")
    commands = runs.commands()
    commands[1] = (code / commands[1][0], *commands[1][1:])
    path = os.pathsep.join(map(str, (code, ROOT)))
    done = two_ranks(*commands, cold=True, second={"PYTHONPATH": path})
    assert [each.returncode for each in done] == [2, 2], done[1].stderr
    for each in done:
        assert f", 0.0.1 on {SECOND}\n  source memformer_dist/zero/engine.py: found sha256 " in each.stderr
        assert each.stderr.count("source ") == 1 and each.stderr.count("version of ") == 1


def test_a_damaged_shard_of_one_rank(runs, corpus_dir, tmp_path):
    """Its manifest is the same, so it is found by its checksum as it is read: the message says on which machine."""
    harmed = Path(shutil.copytree(corpus_dir, tmp_path / "harmed"))
    for path in (harmed / "train").glob("*.tar"):
        with tarfile.open(path) as tar:
            members = tar.getmembers()
        for member in members:
            flip(path, member.offset_data)
    runs.configs[1]["data"]["corpus"] = str(harmed)
    done = two_ranks(*runs.commands())
    assert [each.returncode for each in done] == [2, 2], done[1].stderr
    assert f"error: {SECOND}: {harmed / 'train'}" in done[0].stderr


# ---- evaluate --------------------------------------------------------------------------------------------------------


def test_evaluation_of_other_documents(trained_run, other_corpus, corpus_dir):
    words = ("launch/evaluate.py", "--run-dir", trained_run, "--split", "train", "--corpus")
    done = two_ranks((*words, corpus_dir, "--max-segments", 2), (*words, other_corpus, "--max-segments", 3))
    assert [each.returncode for each in done] == [2, 2], done[0].stderr
    for each in done:
        assert f"--max-segments: found 2 on {FIRST}, 3 on {SECOND}\n" in each.stderr
        assert "--corpus: found fingerprint " in each.stderr


def test_evaluation_of_the_checkpoint_that_rank_0_finds(trained_run, tmp_path):
    """A run that is being trained may save between one rank's look and another's."""
    newer = Path(shutil.copytree(trained_run, tmp_path / "newer"))
    steps = sorted((newer / "checkpoints").iterdir())
    shutil.copytree(steps[-1], newer / "checkpoints/step-99999999")
    words = ("launch/evaluate.py", "--max-segments", 1, "--run-dir")
    done = two_ranks((*words, trained_run), (*words, newer))
    assert [each.returncode for each in done] == [0, 0], done[1].stderr
    shutil.rmtree(newer / "checkpoints" / steps[-1].name)
    done = two_ranks((*words, trained_run), (*words, newer))
    assert [each.returncode for each in done] == [2, 2]
    assert f"error: {SECOND}: {newer / 'checkpoints' / steps[-1].name}: no checkpoint found" in done[0].stderr


# ---- the comparison --------------------------------------------------------------------------------------------------


def unequal_rank(world) -> None:
    """Texts of any lengths, none at all, more or fewer facts: the same message on every rank."""
    assert world.gather("") == [""] * 3
    assert world.gather("é" * world.rank * 1000) == ["", "é" * 1000, "é" * 2000]
    same = {str(number): "x" * 1000 for number in range(100)}
    agreement.require(world, same)
    facts = same | {f"own {world.rank}": "1"} if world.rank else {}
    with pytest.raises(LaunchError) as error:
        agreement.require(world, facts)
    assert set(world.gather(str(error.value))) == {str(error.value)}
    assert f"0: found nothing on {FIRST}, {'x' * 200} ... on ranks 1-2 on {HOST}" in str(error.value)
    assert "and 90 more" in str(error.value)


def test_facts_of_unequal_length():
    run_ranks(3, unequal_rank)


def test_ranks_and_hosts_are_named():
    facts = [{"seed": "0"}] * 4 + [{"seed": "1"}, {"seed": "0"}, {}, {"seed": "1"}]
    hosts = ["a"] * 4 + ["b"] * 4
    assert list(differences(facts, hosts)) == [
        "seed: found 0 on ranks 0-3 on a, rank 5 on b, 1 on ranks 4, 7 on b, nothing on rank 6 on b"
    ]
    assert list(differences(facts[:4], hosts)) == []
    many = [{"seed": str(rank > 0)} for rank in range(9)]
    assert list(differences(many, [f"h{rank}" for rank in range(9)])) == [
        (
            "seed: found False on rank 0 on h0, True on rank 1 on h1, rank 2 on h2, rank 3 on h3, rank 4 on h4"
            " and ranks on 4 other hosts"
        )
    ]


def stale_rank(world, folder) -> None:
    """A checkpoint of the same name that is another one, as a network file system or a restored copy may show it."""
    run_dir = folder / f"rank{world.rank}"
    own = run_dir / "checkpoints/step-00000007"
    own.mkdir(parents=True)
    (own / "manifest.json").write_text(f"of rank {world.rank}")
    token, _, newest = agreement._write_token(run_dir).partition("\n")
    facts = agreement._run_dir_facts(run_dir, token, newest)
    with pytest.raises(LaunchError, match=r"--run-dir: found the folder that rank 0 writes to with step-00000007, sha"):
        agreement.require(world, facts)
    if world.is_main:
        (run_dir / f"{agreement.TOKEN}0123").touch()  # left over by a start that was killed
        agreement._write_token(run_dir)
        assert len(list(run_dir.glob(f"{agreement.TOKEN}*"))) == 1


def test_another_checkpoint_of_the_same_name(tmp_path):
    run_ranks(2, stale_rank, tmp_path)
