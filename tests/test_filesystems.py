"""The file systems of clusters: NFS, imitated by a library that is loaded before libc (helpers/nfs.c); permissions;
small files that are torn; few open files."""

import errno
import itertools
import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memformer_dist.data import maps
from memformer_dist.data.cache import ShardCache
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.schedule_store import ScheduleStore
from memformer_dist.errors import CorpusError
from memformer_dist.files import held, read_json_lines, try_lock, write_text
from memformer_dist.monitor import Monitor
from memformer_dist.prepare.build import shard
from memformer_dist.progress import Position
from tests.helpers import ROOT
from tests.helpers.corpora import check, write_split
from tests.helpers.files import flip, tree
from tests.helpers.runs import last_checkpoint
from tests.helpers.scripts import run_command, run_script, shard_command


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("nfs") / "nfs.so"
    source = ROOT / "tests/helpers/nfs.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", str(path), str(source), "-ldl"], check=True)
    return path


@pytest.fixture
def nfs(library, tmp_path) -> dict[str, str]:
    """The environment of a program for which `tmp_path` lies on NFS."""
    return {"LD_PRELOAD": str(library), "NFS_ROOT": f"{tmp_path}/"}


# ---- NFS -------------------------------------------------------------------------------------------------------------


def silly(folder: Path) -> list[Path]:
    """Files that were removed while they were in use."""
    return list(folder.rglob(".nfs*"))


def test_the_imitation(nfs, tmp_path):
    """Negative control: the library does what NFS does."""
    done = run_script(
        "-c",
        f"""
import errno, fcntl, mmap, os, shutil
from pathlib import Path
def fails(number, function, *arguments):
    try:
        function(*arguments)
    except OSError as error:
        assert error.errno == number, error
    else:
        raise AssertionError(number)
folder = Path({str(tmp_path)!r}) / "folder"
folder.mkdir()
for name in "open", "mapped":
    (folder / name).write_text("text")
file = (folder / "open").open("rb")
with (folder / "mapped").open("rb") as other:
    mapped = mmap.mmap(other.fileno(), 0, access=mmap.ACCESS_READ)
fails(errno.ENOTEMPTY, shutil.rmtree, folder)
assert len(list(folder.glob(".nfs*"))) == 2, os.listdir(folder)
fails(errno.EBUSY, shutil.rmtree, folder)
fails(errno.EBADF, fcntl.flock, file, fcntl.LOCK_EX)
handle = os.open(folder, os.O_RDONLY)
fails(errno.EINVAL, os.fsync, handle)
file.close()
mapped.close()
shutil.rmtree(folder)
""",
        **nfs,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_on_nfs_resumes_and_goes_on_saving(config, nfs, tmp_path, ranks):
    """At its third save a resumed run died of OSError, Directory not empty: it still had the checkpoint open from
    which it had resumed, and removed it."""
    path, run = tmp_path / "tiny.json", tmp_path / "run"
    config["checkpoint"] = {"every_tokens": 200, "keep": 2}
    for tokens in 500, 2500:
        config["training"]["tokens"] = tokens
        path.write_text(json.dumps(config))
        start = [] if ranks == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        done = run_script(*start, "launch/train.py", "--config", path, "--run-dir", run, cold=True, **nfs)
        assert done.returncode == 0, done.stderr
        assert "cannot remove" not in done.stderr
        assert len(list((run / "checkpoints").iterdir())) == 2 and not silly(run)
    assert int(last_checkpoint(run).name[5:]) > 10


def test_preparation_on_nfs(nfs, tmp_path, model_file, two_files):
    """It ended with exit code 2, although the corpus was whole: its lock lay in the folder that it removed at the end."""
    for overwrite in [], ["--overwrite"]:
        command = shard_command(tmp_path / "corpus", model_file, "--input", two_files, *overwrite)
        done = run_command("env", *(f"{name}={value}" for name, value in nfs.items()), *command)
        assert done.returncode == 0 and "cannot remove" not in done.stderr, done.stderr
        assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "one.txt", "two.txt"]
    assert run_command(*shard_command(tmp_path / "plain", model_file, "--input", two_files)).returncode == 0
    assert tree(tmp_path / "corpus") == tree(tmp_path / "plain") and not silly(tmp_path)


def test_programs_work_without_locks(nfs, tmp_path, model_file, two_files):
    command = shard_command(tmp_path / "corpus", model_file, "--input", two_files)
    done = run_command("env", "NFS_NO_LOCKS=1", *(f"{name}={value}" for name, value in nfs.items()), *command)
    assert done.returncode == 0, done.stderr
    assert "corpus.partial.lock: this file system has no locks" in done.stderr


def test_a_cache_on_nfs_spares_the_files_of_living_processes(nfs, tmp_path):
    """NFS locks no file that is open for reading alone: the announcement of a living process was taken for that of a dead
    one, and removed."""
    done = run_script(
        "-c",
        f"""
from pathlib import Path
from memformer_dist.data.cache import ShardCache
folder = Path({str(tmp_path)!r}) / "cache"
first, second = (ShardCache(folder, {{"a": 1}}, 10) for _ in range(2))
assert len(list(folder.glob("reader-*.json"))) == 2
""",
        **nfs,
    )
    assert done.returncode == 0, done.stderr


def test_a_saved_generation_is_not_held_open(nfs, tmp_path):
    done = run_script(
        "-c",
        f"""
from pathlib import Path
from memformer_dist.generate import Generation
from tests.helpers.memformer import make
import torch
cell, path = make(dtype=torch.float32), Path({str(tmp_path)!r}) / "saved"
generation = Generation(cell, eos_id=2)
generation.feed([[3, 4, 5]])
generation.save(path)
again = Generation.load(path, cell, eos_id=2)
path.unlink()
assert not list(path.parent.iterdir()), list(path.parent.iterdir())
again.feed([[6]])
assert again.history == [[3, 4, 5, 6]]
""",
        **nfs,
    )
    assert done.returncode == 0, done.stderr


def test_a_lock_that_is_removed_at_the_end(tmp_path):
    """Whoever opened it before it was removed does not take the old file for the lock."""
    path = tmp_path / "lock"
    with held(path) as is_ours:
        assert is_ours
        with held(path) as too:
            assert not too
        assert path.exists()
        waiting = path.open("a")
    assert not path.exists()
    assert try_lock(waiting)  # of the file that is gone
    with held(path) as is_ours:
        assert is_ours
    waiting.close()


def test_a_lock_that_is_removed_between_opening_and_locking(tmp_path, monkeypatch):
    path, number = tmp_path / "lock", itertools.count()

    def lock_after_removal(file):
        if next(number) == 0:
            path.unlink()
        return try_lock(file)

    monkeypatch.setattr("memformer_dist.files.try_lock", lock_after_removal)
    with held(path) as is_ours:
        assert is_ours and path.exists() and next(number) == 2


# ---- permissions -----------------------------------------------------------------------------------------------------


def wrong_modes(folder: Path, umask: int) -> dict[str, str]:
    """Files and folders that do not have the permissions which the umask gives to new ones."""
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}
    expected = {path: (0o777 if path.is_dir() else 0o666) & ~umask for path in found}
    return {str(path.relative_to(folder)): oct(mode) for path, mode in found.items() if mode != expected[path]}


@pytest.mark.slow
@pytest.mark.parametrize("umask", [0o022, 0o002])
def test_everything_follows_the_umask(config, tmp_path, model_file, two_files, umask):
    """Weights, moments and lanes were -rw------- whatever the umask: no colleague could evaluate or resume."""
    folder, path = tmp_path / "made", tmp_path / "tiny.json"
    config["training"]["tokens"] = 300
    folder.mkdir()
    folder.chmod(0o777 & ~umask)
    programs = [
        shard_command(folder / "corpus", model_file, "--input", two_files),
        [sys.executable, ROOT / "launch/train.py", "--config", path, "--run-dir", folder / "run"],
        [sys.executable, ROOT / "launch/evaluate.py", "--run-dir", folder / "run", "--json", folder / "figures.json"],
        [
            *(sys.executable, ROOT / "launch/generate.py", "--run-dir", folder / "run", "--prompt", "It was"),
            *("--tokens", "3", "--save", folder / "saved"),
        ],
    ]
    path.write_text(json.dumps(config))
    for program in programs:
        done = run_command("sh", "-c", f'umask {umask:o}; exec "$@"', "sh", *program)
        assert done.returncode == 0, done.stderr
    assert (folder / "saved").exists() and (folder / "figures.json").exists()
    assert wrong_modes(folder, umask) == {}


@pytest.fixture
def umask_of_a_group():
    before = os.umask(0o002)
    yield 0o002
    os.umask(before)


def test_caches_and_schedules_follow_the_umask(tmp_path, umask_of_a_group):
    """What a process announces was readable by its user alone, and the next user's process ended with an error."""
    cache = ShardCache(tmp_path / "cache", {"a": 1}, 10)
    reservation = cache.reserve("a", needed=True)
    reservation.path.write_bytes(b"a")
    reservation.keep()
    cache.prefetch(["a"])
    ScheduleStore(tmp_path / "schedules", "key").save("000000", {"a": np.arange(3)})
    assert len(list(tmp_path.rglob("*"))) == 6
    assert wrong_modes(tmp_path, umask_of_a_group) == {}


# ---- small files that are torn ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["", '{"steps": 1', "[]", "\0\0\0"])
def test_a_torn_summary_is_made_again(trained_run, tmp_path, torn):
    """An empty summary.json, as a full disk leaves it, ended every later start with a traceback."""
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    whole = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(torn)
    with (run / "starts.jsonl").open("a") as file:
        file.write('{"time": "20')
    path = tmp_path / "tiny.json"
    path.write_bytes((run / "config.json").read_bytes())
    done = run_script("launch/train.py", "--config", path, "--run-dir", run)
    assert done.returncode == 0, done.stderr
    assert f"{run / 'summary.json'}: is damaged" in done.stderr and f"{run / 'starts.jsonl'}: left out" in done.stderr
    again = json.loads((run / "summary.json").read_text())
    assert {name: again[name] for name in ("eval_loss", "steps")} == {
        name: whole[name] for name in ("eval_loss", "steps")
    }
    steps = [json.loads(line)["step"] for line in (run / "starts.jsonl").read_text().splitlines()]
    assert steps == [0, whole["steps"]]


def test_torn_lines_are_left_out(tmp_path, caplog):
    path = tmp_path / "lines.jsonl"
    assert read_json_lines(path) == []
    path.write_bytes(b'{"a": 1}\n\0\0\0\0{"a": 2}\n{"a"\n\xff\n[1]\n{"a": 3}\n{"a": 4}')
    assert read_json_lines(path) == [(b'{"a": 1}\n', {"a": 1}), (b'{"a": 3}\n', {"a": 3})]
    assert caplog.messages == [f"{path}: left out what is torn: lines 2, 3, 4, 5, 7"]


def test_records_that_are_torn_do_not_end_a_resumed_run(tmp_path):
    """A line of zeros in metrics.jsonl, as a machine that lost its power leaves it, was a traceback."""
    records = tmp_path / "metrics.jsonl"
    records.write_bytes(
        b'{"step": 1, "tokens": 10}\n\0\0\0\n{"step": 2, "tokens": 20}\n{"step": 9, "tokens": 90}\n{"st'
    )
    Monitor(tmp_path, Position(step=2, tokens=20), is_main=True).close()
    assert records.read_bytes() == b'{"step": 1, "tokens": 10}\n{"step": 2, "tokens": 20}\n'


def test_what_is_no_plain_file_is_written_to_and_never_replaced(tmp_path):
    """--json /dev/stdout, a link, a named pipe."""
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR | os.O_NONBLOCK)
    write_text(tmp_path / "pipe", "figures")
    assert os.read(end, 100) == b"figures" and (tmp_path / "pipe").is_fifo()
    os.close(end)
    done = run_script(
        "-c",
        "from pathlib import Path; from memformer_dist.files import write_text; write_text(Path('/dev/stdout'), 'x')",
    )
    assert (done.returncode, done.stdout) == (0, "x"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]


def test_a_file_that_cannot_be_replaced_is_written_in_place(tmp_path, monkeypatch):
    """A single file mounted into a container: renaming over it is EBUSY."""

    def busy(path, target):
        raise OSError(errno.EBUSY, "Device or resource busy", str(target))

    monkeypatch.setattr(Path, "rename", busy)
    (tmp_path / "figures.json").write_text("old and longer")
    write_text(tmp_path / "figures.json", "new")
    assert tree(tmp_path) == {"figures.json": b"new"}


@pytest.mark.parametrize("damaged", ["sharding.json", "shards/000000.json", "encoded/*.json"])
def test_torn_files_of_preparation_are_made_again(tmp_path, model_file, two_files, monkeypatch, damaged):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("memformer_dist.prepare.build.merge", interrupted)
        shard(tmp_path / "corpus", model_file, [two_files])
    (path,) = (tmp_path / "corpus.partial").glob(damaged)
    path.write_text("")
    shard(tmp_path / "corpus", model_file, [two_files])
    shard(tmp_path / "fresh", model_file, [two_files])
    assert tree(tmp_path / "corpus") == tree(tmp_path / "fresh")


def interrupted(*_: object, **__: object):
    raise KeyboardInterrupt


# ---- few open files --------------------------------------------------------------------------------------------------

SHARDS = 1200


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Path:
    """A corpus of two splits of SHARDS shards, one document in each, whose tokens are its number."""
    corpus = tmp_path_factory.mktemp("many")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("memformer_dist.data.format.flush", lambda path: None)
        for split in "train", "valid":
            write_split(corpus / split, [np.full(4, number) for number in range(SHARDS)], shard_tokens=4)
    return corpus


READ_BOTH_SPLITS = """
import resource, os, sys
import numpy as np
soft, hard, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.dataset import Spans
from memformer_dist.data.mixture import Mixture
from fractions import Fraction
train, valid = (Corpus.open(f"{folder}/{name}") for name in ("train", "valid"))
both = Mixture([train, valid], [Fraction(1), Fraction(1)])
total, shuffled = len(both.lengths), np.random.default_rng(0)
views = []
for some in np.array_split(shuffled.permutation(np.tile(np.arange(total), 2)), 40):
    both.prefetch(Spans(some, np.zeros_like(some), both.lengths[some]))
    both.check(Spans(some, np.zeros_like(some), both.lengths[some]))
    views = [(document, both.tokens(document, 0, 4)) for document in some.tolist()[:8]] + views[:8]
    for document in some.tolist():
        assert both.tokens(document, 1, 3).tolist() == [document % (total // 2)] * 2
    assert all((tokens == document % (total // 2)).all() for document, tokens in views)
print(len(os.listdir("/proc/self/fd")), resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_more_shards_than_files_may_be_open(many_shards):
    """1,200 + 1,200 shards under `ulimit -n 256`: a map for each, for good, was "Too many open files"."""
    done = run_script("-c", READ_BOTH_SPLITS, "256", "256", many_shards)
    assert done.returncode == 0, done.stderr
    held, limit = map(int, done.stdout.split())
    assert held < 100 and limit == 256
    done = run_script("-c", READ_BOTH_SPLITS, "256", "2000", many_shards)
    held, limit = map(int, done.stdout.split())
    assert 500 <= held < 600 and limit == 2000  # raised to the hard limit


def test_remote_shards_under_few_files(many_shards, tmp_path):
    """The shards of a cache count too."""
    done = run_script(
        "-c",
        f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
import numpy as np
from memformer_dist.data.dataset import Spans
from memformer_dist.data.open_data import open_split
corpus = open_split("file://{many_shards}/train", cache={str(tmp_path)!r})
for some in np.array_split(np.arange(300), 3):
    spans = Spans(some, np.zeros_like(some), corpus.lengths[some])
    corpus.prefetch(spans)
    corpus.check(spans)
    assert [corpus.tokens(document, 0, 4)[0] for document in some] == some.tolist()
print(len(os.listdir("/proc/self/fd")))
""",
    )
    assert done.returncode == 0 and int(done.stdout) < 100, done.stderr


def test_no_file_left_to_open(many_shards):
    """What is mapped makes way; where that is not enough, the message names the limit."""
    done = run_script(
        "-c",
        f"""
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from memformer_dist.data.corpus import Corpus
from memformer_dist.errors import CorpusError
corpus = Corpus.open({str(many_shards / "train")!r})
assert corpus.tokens(3, 0, 4).tolist() == [3] * 4
taken = []
try:
    while True:
        taken.append(os.open("/dev/null", os.O_RDONLY))
except OSError:
    pass
os.close(taken.pop())
assert corpus.tokens(5, 0, 4).tolist() == [5] * 4  # the map of document 3 makes way
os.open("/dev/null", os.O_RDONLY)
try:
    for document in range(SHARDS):
        corpus.tokens(document, 0, 4)
except CorpusError as error:
    assert "this process may open 64 files (ulimit -n)" in str(error), error
else:
    raise AssertionError
""".replace("SHARDS", str(SHARDS)),
    )
    assert done.returncode == 0, done.stderr


def test_a_shard_that_changes_while_it_is_not_mapped(tmp_path, monkeypatch):
    """It is compared with its crc32 again; a copy with the same bytes is as good."""
    corpus = Corpus.open(write_split(tmp_path / "split", [np.full(4, 5), np.full(4, 6)], shard_tokens=4))
    monkeypatch.setattr(maps, "_limit", 1)
    file = tmp_path / "split" / "shard-000000.tar"

    def read() -> list[int]:
        corpus.tokens(1, 0, 4)  # the other shard: this one is unmapped
        return corpus.tokens(0, 0, 4).tolist()

    check(corpus, 0)
    check(corpus, 1)
    shutil.copy(file, tmp_path / "copy")
    os.replace(tmp_path / "copy", file)
    assert read() == [5] * 4
    flip(file, 512)
    with pytest.raises(CorpusError, match="shard-000000.tar: the tokens of document 0 at byte 512 are damaged"):
        read()
    flip(file, 512)
    assert read() == [5] * 4


def test_maps_of_a_corpus_that_is_gone_are_forgotten(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "_limit", 2)
    monkeypatch.setattr(maps, "_recent", type(maps._recent)())
    split = write_split(tmp_path / "split", [np.full(4, number) for number in range(4)], shard_tokens=4)
    for _ in range(3):
        corpus = Corpus.open(split)
        assert [corpus.tokens(number, 0, 4)[0] for number in (0, 1, 2, 3, 0)] == [0, 1, 2, 3, 0]
        assert corpus._maps.shards.keys() == {3, 0} and len(maps._recent) == 2
