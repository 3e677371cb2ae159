"""A user's mistakes at the command line: exit code 2, one message naming the thing, no traceback, a copy in the log."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from memformer_dist.commands.train import find_config
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.errors import UserError
from memformer_dist.prepare.build import shard
from tests.helpers import ROOT
from tests.helpers.corpora import make_corpus
from tests.helpers.ranks import run_ranks
from tests.helpers.runs import SEGMENT_LENGTH
from tests.helpers.scripts import run_script


@pytest.fixture
def copy_of_corpus(corpus_dir, tmp_path, config) -> Path:
    """One to harm; the configuration reads it."""
    path = Path(shutil.copytree(corpus_dir, tmp_path / "harmed"))
    config["data"]["corpus"] = str(path)
    return path


def train(config: dict | Path, run_dir: Path, *options, **environment) -> subprocess.CompletedProcess:
    path = config
    if isinstance(config, dict):
        path = run_dir.with_suffix(".json")
        path.write_text(json.dumps(config))
    return run_script("launch/train.py", "--config", path, "--run-dir", run_dir, *options, **environment)


def message_of(done: subprocess.CompletedProcess, run_dir: Path) -> str:
    """What the user reads; it is in the run's log as well, as its last entry."""
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    message = "error: " + done.stderr.partition("error: ")[2]
    assert (run_dir / "log.txt").read_text().endswith(f" rank 0  {message}")
    return message.removeprefix("error: ").rstrip("\n")


# ---- before the process group ----------------------------------------------------------------------------------------


def test_the_configuration_is_not_there(tmp_path):
    message = message_of(train(tmp_path / "gone.json", tmp_path / "run"), tmp_path / "run")
    assert message.startswith(f"--config: found no file {tmp_path / 'gone.json'}, expected a file or one of the")
    assert " configurations armt, base, big, books_cpu, " in message


def test_the_configuration_is_not_json(tmp_path):
    (tmp_path / "bad.json").write_text('{"data": {"lanes": 4,}}')
    message = message_of(train(tmp_path / "bad.json", tmp_path / "run"), tmp_path / "run")
    assert message.startswith(f"{tmp_path / 'bad.json'}: not JSON: ") and "line 1 column 22" in message


def test_every_mistake_of_the_configuration_is_reported_at_once(config, tmp_path):
    config["mrbp"]["windw"] = 4
    config["training"]["precision"] = "fp16"
    config["deepspeed"] = {"train_batch_size": 8, "optimizer": {"type": "Adam"}, "fp16": {"enabled": True}}
    options = ("--set", "data.corpus=nowhere", "--set", "checkpoint.keep=1", "--set", "monitor")
    done = train(config, tmp_path / "run", *options, WORLD_SIZE="3")
    first, *lines = message_of(done, tmp_path / "run").splitlines()
    assert first == f"{tmp_path / 'run.json'}: 10 problems" and len(lines) == 10
    for line, start in zip(
        lines,
        [
            "--set monitor: expected section.field=value",
            "mrbp.windw: unknown key, did you mean window?",
            "training.precision: found 'fp16', expected 'fp32' or 'bf16'; fp16 is refused",
            "checkpoint.keep: found 1; ",
            "deepspeed.train_batch_size: not allowed here; set data.lanes",
            "deepspeed.optimizer: not allowed here; set the section optimizer",
            "deepspeed.fp16: not allowed here; set training.precision; fp16 is refused: loss scaling",
            "data.lanes: found 4, expected a multiple of the 3 ranks, 3 for example",
            "data.corpus: no token shards in nowhere/train; tokenizer/shard.py writes them",
            "data.corpus: no token shards in nowhere/valid; tokenizer/shard.py writes them",
        ],
        strict=True,
    ):
        assert line.startswith(f"  {start}")


def test_on_several_ranks_one_speaks(config, tmp_path):
    """The others find the same mistake and end with the same code, silently."""
    done = train(config, tmp_path / "run", WORLD_SIZE="3", RANK="1")
    assert (done.returncode, done.stderr) == (2, "") and not (tmp_path / "run").exists()


def test_a_shard_was_cut_short(config, copy_of_corpus, tmp_path):
    shard = copy_of_corpus / "train" / "shard-000000.tar"
    size = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:-512])
    message = message_of(train(config, tmp_path / "run"), tmp_path / "run")
    assert message == f"{shard}: {size - 512} bytes, expected {size} bytes"


def test_the_tokenizer_is_another(config, copy_of_corpus, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(make_corpus(other, seed=1) / "tokenizer.model", copy_of_corpus / "tokenizer.model")
    message = message_of(train(config, tmp_path / "run"), tmp_path / "run")
    shards = copy_of_corpus / "train"
    assert message.startswith(
        f"{copy_of_corpus / 'tokenizer.model'}: is not the tokenizer that the shards in {shards} were made with: sha256"
    )


BROKEN = """
from pathlib import Path
from memformer_dist.errors import run_program
run_program(lambda: 1 / 0, error_log=Path("{log}"))
"""


def test_an_error_of_ours_is_in_the_log_with_its_rank(tmp_path):
    """On any rank: what torchrun shows may be drowned by the others."""
    done = run_script("-c", BROKEN.format(log=tmp_path / "run" / "log.txt"), RANK="3")
    assert done.returncode == 1 and done.stderr.startswith("Traceback ")
    assert (tmp_path / "run" / "log.txt").read_text().endswith(f" rank 3  {done.stderr}")
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")


def test_a_configuration_by_name():
    """Files go first; the names of those in configs/ are known anywhere, with or without folder and suffix."""
    expected = ROOT / "configs" / "small.json"
    for name in ("small", "small.json", "configs/small.json", str(expected)):
        assert find_config(name).resolve() == expected
    for name in ("tiny", "other/small.json", "/configs/small.json", "configs/small.yaml"):
        with pytest.raises(UserError, match=f"--config: found no file {name}, expected a file or .* base, big, "):
            find_config(name)


# ---- while training --------------------------------------------------------------------------------------------------


def test_a_flipped_byte_stops_the_run_and_is_named(config, copy_of_corpus, tmp_path):
    corpus = Corpus.open(copy_of_corpus / "train")
    schedule = LaneSchedule(corpus.lengths, seed=0, lanes=4, segment_length=SEGMENT_LENGTH)
    document = int(schedule.at(0).document[2])
    payload = corpus.tokens(document, 0, 10**6).tobytes()
    shard = copy_of_corpus / "train" / "shard-000000.tar"
    raw = bytearray(shard.read_bytes())
    offset = raw.index(payload)
    raw[offset + len(payload) - 2] ^= 4
    shard.write_bytes(raw)
    message = message_of(train(config, tmp_path / "run"), tmp_path / "run")
    assert message.startswith(f"{shard}: the tokens of document {document} at byte {offset} are damaged: crc32 is ")
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.fixture
def copy_of_run(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


def test_resuming_with_other_values_of_what_may_not_change(config, copy_of_run):
    """All of them are named, and what may change is not."""
    config["data"] |= {"segment_length": 8, "seed": 1, "prefetch": 0}
    config["training"] |= {"seed": 7, "tokens": 900}
    message = message_of(train(config, copy_of_run), copy_of_run)
    first, *lines, last = message.splitlines()
    assert first == "a resumed run cannot change these fields:"
    assert sorted(lines) == [
        "  data.seed: found 1, the run has 0",
        "  data.segment_length: found 8, the run has 16",
        "  training.seed: found 7, the run has 0",
    ]
    assert last.startswith("set them back, or start a fresh run")


@pytest.mark.parametrize("what", ["documents", "weights", "tokenizer"])
def test_resuming_with_another_corpus(config, corpus_dir, copy_of_run, tmp_path, what):
    texts = tmp_path / "texts"
    if what == "tokenizer":
        other = make_corpus(tmp_path, seed=1)
    elif what == "documents":
        texts.mkdir()
        for number in range(3):
            (texts / f"{number}.txt").write_text(f"ba be bi {number}")
        shard(tmp_path / "other", corpus_dir / "tokenizer.model", [str(texts)], valid_fraction=0.3)
        other = tmp_path / "other"
    else:
        other = {str(corpus_dir): 2.0}
    config["data"]["corpus"] = other if what == "weights" else str(other)
    message = message_of(train(config, copy_of_run), copy_of_run)
    was = Corpus.open(corpus_dir / "train")
    if what == "tokenizer":
        found, expected = (x.vocabulary.tokenizer_sha256[:12] for x in (Corpus.open(other / "train"), was))
        expected = (
            f"data.corpus: {other} was made with another tokenizer than this run's"
            f" (sha256 {found}, the run has {expected})"
        )
    elif what == "documents":
        expected = (
            f"data.corpus: {other} is not the corpus that this run was trained on"
            f" (fingerprint {Corpus.open(other / 'train').fingerprint[:12]}, the run has {was.fingerprint[:12]})"
        )
    else:
        expected = f"data.corpus: {other} with these weights is not the corpus that this run was trained on"
    assert message.startswith(expected)


def test_every_checkpoint_is_damaged(config, copy_of_run):
    """The run must not start afresh over them, and says where they are."""
    for weights in copy_of_run.glob("checkpoints/*/weights-00000.safetensors"):
        weights.write_bytes(weights.read_bytes()[:-1])
    message = message_of(train(config, copy_of_run), copy_of_run)
    assert message.startswith(f"{copy_of_run / 'checkpoints'}: every checkpoint is damaged")


def test_a_run_that_is_whole_goes_on(config, copy_of_run):
    """What the refusals above are measured by: with nothing but a larger budget the same command trains."""
    config["training"]["tokens"] = 900
    done = train(config, copy_of_run)
    assert done.returncode == 0, done.stderr
    assert json.loads((copy_of_run / "summary.json").read_text())["tokens"] >= 900
    assert "error: " not in (copy_of_run / "log.txt").read_text()


def together_rank(world):
    """What one rank cannot do stops both, with its message; what all can, each does for itself."""
    from memformer_dist.errors import UserError

    def broken(rank):
        if world.rank == rank:
            raise UserError(f"rank {rank}: no such shard")
        return "opened"

    assert world.on_all_or_raise(lambda: f"{broken(2)} by {world.rank}") == f"opened by {world.rank}"
    for rank in range(2):
        with pytest.raises(UserError, match=f"rank {rank}: no such shard"):
            world.on_all_or_raise(lambda: broken(rank))


def test_the_mistake_of_one_rank_stops_all():
    run_ranks(2, together_rank)
