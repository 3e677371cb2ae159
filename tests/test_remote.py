"""Shards behind a real server that fails: what is read equals the local corpus, or a clear error says why not."""

import errno
import json
import multiprocessing
import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from memformer_dist.data import remote, transfer, windows
from memformer_dist.data.cache import ShardCache
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.dataset import Spans
from memformer_dist.data.format import SplitWriter
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.open_data import open_corpora, open_split
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.files import PARTIAL
from tests.helpers import ROOT
from tests.helpers.corpora import VOCABULARY, check
from tests.helpers.http import ALWAYS, FileServer
from tests.helpers.waiting import PATIENCE_S, wait_until

SHARDS, PER_SHARD = 8, 3  # shards, and documents of each


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/, of shards of one size."""
    folder = tmp_path_factory.mktemp("served")
    generator = np.random.default_rng(0)
    with SplitWriter(folder / "train", VOCABULARY, shard_tokens=PER_SHARD * 2000) as writer:
        for _ in range(SHARDS * PER_SHARD):
            writer.add(generator.integers(4, 1000, 2000))
    return folder


@pytest.fixture
def server(folder):
    with FileServer(folder) as server:
        yield server


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Five tries without pauses. A shard that failed rests until the test ends its rest (see `rested`)."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(transfer, "TRIES", 5)
    monkeypatch.setattr(remote, "REST_S", 10**6)


@pytest.fixture
def rested(monkeypatch):
    """Called, it ends the rest of shards that failed."""
    return lambda: monkeypatch.setattr(remote, "REST_S", 0.0)


@pytest.fixture
def stalls(monkeypatch):
    """A connection counts as stalled after a second: long enough for a busy machine, short enough for a test."""
    monkeypatch.setattr(transfer, "STALL_S", 1.0)


def shard(number):
    return f"train/shard-{number:06d}.tar"


def opened(server, cache, shards_held=SHARDS):
    """The corpus through a cache for so many shards."""
    size = json.loads((server.folder / "train" / "corpus.json").read_text())["shards"][0]["bytes"]
    return open_split(f"{server.url}/train", cache=cache, cache_gib=(shards_held + 0.5) * size / 2**30)


def prefetch(corpus, documents):
    """All of the documents, in the order of need."""
    documents = np.array(list(documents), np.int64)
    corpus.prefetch(Spans(documents, np.zeros_like(documents), corpus.lengths[documents]))


def assert_reads_all(corpus, folder, documents=range(SHARDS * PER_SHARD)):
    local = Corpus.open(folder / "train")
    assert corpus.fingerprint == local.fingerprint and corpus.lengths.tolist() == local.lengths.tolist()
    for document in documents:
        check(corpus, document)
        assert np.array_equal(corpus.tokens(document, 0, 10**9), local.tokens(document, 0, 10**9))


def cached(cache):
    return sorted(path.name for path in cache.glob("*/*.tar"))


def finish_fetching(corpus):
    """Wait until all that was to be fetched ahead is there, or was given up."""
    with corpus._shards._changed:
        assert corpus._shards._changed.wait_for(lambda: not corpus._shards._threads, timeout=60)


def recording(taken):
    """ShardCache.locked, which appends to `taken` the bytes of the folder's shards, those being fetched at their full size.

    All changes are made under the lock, so no state is missed, and none is seen half changed.
    """
    locked = ShardCache.locked

    @contextmanager
    def recorded(cache):
        with locked(cache):
            yield
            names = {path.name.removesuffix(PARTIAL) for path in cache.folder.iterdir()}
            taken.append(sum(size for name, size in cache._sizes.items() if name in names))

    return recorded


@pytest.fixture
def taken(monkeypatch):
    """What the shards in cache folders take after each change (see `recording`)."""
    taken = []
    monkeypatch.setattr(ShardCache, "locked", recording(taken))
    return taken


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_without_faults_everything_is_fetched_once(server, folder, tmp_path, capfd, caplog):
    assert_reads_all(opened(server, tmp_path), folder)
    assert sorted(name for name, _ in server.requests) == sorted(
        ["train/corpus.json", "train/index.safetensors", *map(shard, range(SHARDS))]
    )
    assert capfd.readouterr() == ("", "") and not caplog.records
    assert_reads_all(opened(server, tmp_path), folder)  # from the cache
    assert [name for name, _ in server.requests[SHARDS + 2 :]] == ["train/corpus.json"]


FAULTS = ["drop", "truncate", 500, 503, "flip", "short", "long", "stall"]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_fails_is_fetched_again(server, folder, tmp_path, caplog, stalls, ahead):
    """Every file meets faults of its own; what is read is right all the same, and each retry is reported."""
    server.faults["train/corpus.json"] = ["truncate", "short"]
    server.faults["train/index.safetensors"] = ["flip", "drop", 503]
    for number, fault in enumerate(FAULTS):
        server.faults[shard(number)] = [fault] * (1 if fault in ("flip", "long", "stall") else 3)
    corpus = opened(server, tmp_path)
    if ahead:
        prefetch(corpus, range(SHARDS * PER_SHARD))
    assert_reads_all(corpus, folder)
    told = caplog.messages
    for number, fault in enumerate(FAULTS):
        tries = 2 if fault in ("flip", "long", "stall") else 4
        assert server.count(shard(number)) == tries
        if fault == "drop":
            tries = 2  # aiohttp itself asks once more, silently, where a server closes the connection without a word
        said = [line for line in told if line.startswith(f"{server.url}/{shard(number)}: ")]
        assert [re.search(r"; try (\d) of 5, the next in [\d.]+ s$", line)[1] for line in said] == [
            str(number + 1) for number in range(tries - 1)
        ]
    assert not any("given up" in line for line in told)


@pytest.mark.parametrize(
    "fault, reason",
    [
        ("drop", "given up after 5 tries: ServerDisconnectedError"),
        ("truncate", "given up after 5 tries: ClientPayloadError"),
        (503, "given up after 5 tries: ClientResponseError: 503"),
        ("short", r"given up after 5 tries: OSError: \d+ bytes arrived, expected \d+"),
        ("flip", "given up after 2 tries: sha256 is [0-9a-f]{64}, expected [0-9a-f]{64}"),
        ("long", r"given up after 2 tries: (more than the )?\d+ bytes"),
        (404, "not found"),
        (403, "refused: 403"),
    ],
)
@pytest.mark.parametrize("ahead", [False, True])
def test_a_permanent_fault_is_a_clear_error(server, folder, tmp_path, rested, fault, reason, ahead):
    server.faults[shard(1)] = [fault] * ALWAYS
    corpus = opened(server, tmp_path)
    if ahead:
        prefetch(corpus, range(SHARDS * PER_SHARD))
    assert_reads_all(corpus, folder, range(PER_SHARD))
    asked = []
    for _ in range(2):  # the same when it is asked for again, without another try
        with pytest.raises(CorpusError, match=re.escape(f"{server.url}/{shard(1)}: ") + reason):
            check(corpus, PER_SHARD)
        asked.append(server.count(shard(1)))
    assert asked[0] == asked[1]
    assert_reads_all(corpus, folder, range(2 * PER_SHARD, 3 * PER_SHARD))
    assert not list(tmp_path.glob("*/shard-000001.tar*"))
    server.faults.clear()
    rested()
    assert_reads_all(corpus, folder)  # once the server has recovered


@pytest.mark.slow
def test_a_stalled_connection_does_not_hang(server, folder, tmp_path, monkeypatch, stalls):
    monkeypatch.setattr(transfer, "TRIES", 3)
    server.faults[shard(0)] = ["stall"] * ALWAYS
    corpus = opened(server, tmp_path)
    with pytest.raises(CorpusError, match="given up after 3 tries: .*[Tt]imeout"):
        check(corpus, 0)
    assert server.count(shard(0)) == 3


def test_who_waits_for_a_thread_gets_its_error(server, tmp_path, monkeypatch):
    """The shard is being fetched when it is needed: one series of tries, and its error, at once."""
    server.faults[shard(0)] = ["stall"] + [500] * ALWAYS
    corpus = opened(server, tmp_path)
    changed = corpus._shards._changed
    wait = changed.wait
    # The first try ends when it is waited for.
    monkeypatch.setattr(changed, "wait", lambda seconds: (server.released.set(), wait(seconds)))
    prefetch(corpus, [0])
    wait_until(server.shards)  # the thread has begun
    with pytest.raises(CorpusError, match="given up after 5 tries"):
        check(corpus, 0)
    assert server.released.is_set()
    assert server.count(shard(0)) == 5
    prefetch(corpus, [0, 3])  # it is not fetched ahead over and over
    check(corpus, 3)
    assert server.count(shard(0)) == 5


def test_a_full_disk(server, folder, tmp_path, monkeypatch, caplog, rested):
    corpus = opened(server, tmp_path)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    message = (
        f"data.cache: {corpus._shards.folder}: the disk is full (No space left on device), shard-000000.tar is not"
    )
    with monkeypatch.context() as patch:
        patch.setattr(corpus._shards._remote._files, "get_file", full)
        with pytest.raises(CorpusError, match=re.escape(message)):
            check(corpus, 0)
    assert not caplog.records and not list(tmp_path.glob("*/*.tar*"))
    rested()
    assert_reads_all(corpus, folder)


@pytest.mark.parametrize(
    "name, fault, message",
    [
        ("train/corpus.json", "short", "corpus.json: given up after 2 tries"),
        ("train/corpus.json", "truncate", "corpus.json: given up after 5 tries: ClientPayloadError"),
        ("train/corpus.json", 404, "corpus.json: not found"),
        ("train/index.safetensors", "flip", "index.safetensors: given up after 2 tries: sha256 is"),
    ],
)
def test_opening_what_cannot_be_fetched(server, tmp_path, name, fault, message):
    server.faults[name] = [fault] * ALWAYS
    with pytest.raises(CorpusError, match=re.escape(f"{server.url}/train/") + message):
        opened(server, tmp_path)


def test_a_server_that_is_not_there(tmp_path):
    with pytest.raises(CorpusError, match="given up after 5 tries: ClientConnectorError"):
        open_split("http://127.0.0.1:9/train", cache=tmp_path)
    with pytest.raises(UserError, match="^nonsense://a/train: Protocol not known: nonsense"):
        open_split("nonsense://a/train", cache=tmp_path)


def test_a_cache_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=f"data.cache: {tmp_path}/file/.*: Not a directory; expected a folder on a local disk"
    ):
        opened(server, tmp_path / "file")


def test_a_damaged_cache_is_found_out(server, folder, tmp_path):
    """A file that changed in the cache is fetched again if its size or hash (index) differs; else its documents are damaged."""
    assert_reads_all(opened(server, tmp_path), folder)
    (place,) = tmp_path.iterdir()
    (place / "shard-000000.tar").write_bytes(b"cut short")
    index = bytearray((place / "index.safetensors").read_bytes())
    index[-1] ^= 1
    (place / "index.safetensors").write_bytes(index)
    raw = bytearray((place / "shard-000001.tar").read_bytes())
    raw[600] ^= 1
    (place / "shard-000001.tar").write_bytes(raw)
    corpus = opened(server, tmp_path)
    assert_reads_all(corpus, folder, range(PER_SHARD))
    assert server.count(shard(0)) == 2 and server.count("train/index.safetensors") == 2
    with pytest.raises(
        CorpusError, match=rf"{server.url}/{shard(1)} \(cached as {place}/shard-000001.tar\): the tokens"
    ):
        check(corpus, PER_SHARD)


# ---- ahead of need, within the bound ---------------------------------------------------------------------------------


def test_fetched_ahead_in_the_order_of_need(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FETCHERS", 1)
    corpus = opened(server, tmp_path, shards_held=4)
    order = [5, 2, 7, 1, 0, 3]
    prefetch(corpus, [number * PER_SHARD + document for number in order for document in range(PER_SHARD)])
    finish_fetching(corpus)
    assert len(cached(tmp_path)) == 4 and server.shards() == [
        shard(number) for number in order[:4]
    ]  # as many as there is room for
    waited = corpus._shards.wait_s
    assert_reads_all(corpus, folder, [15, 6, 21, 3])
    assert len(server.shards()) == 4 and corpus._shards.wait_s == waited
    prefetch(corpus, [number * PER_SHARD for number in order[2:]])  # two were passed
    finish_fetching(corpus)
    assert server.shards()[4:] == [shard(0), shard(3)]
    assert cached(tmp_path) == [f"shard-{number:06d}.tar" for number in (0, 1, 3, 7)]


def test_what_is_needed_now_does_not_wait_for_what_is_fetched_ahead(server, folder, tmp_path):
    """Threads hang at other shards; one that was not announced is fetched at once."""
    for number in range(4):
        server.faults[shard(number)] = ["hold"]
    corpus = opened(server, tmp_path)
    prefetch(corpus, range(SHARDS * PER_SHARD))
    wait_until(lambda: len(server.shards()) == remote.FETCHERS)
    assert_reads_all(corpus, folder, [7 * PER_SHARD])
    server.released.set()
    assert_reads_all(corpus, folder)
    assert max(map(server.count, map(shard, range(SHARDS)))) == 1


@pytest.mark.parametrize("shards_held", [1, 2, 3])
def test_the_bound_is_kept_at_all_times(server, folder, tmp_path, taken, shards_held):
    corpus = opened(server, tmp_path, shards_held)
    generator = np.random.default_rng(0)
    for turn in range(30):
        documents = generator.permutation(SHARDS)[: shards_held + 2] * PER_SHARD
        prefetch(corpus, documents if turn % 3 else [])
        if turn % 3:
            documents = documents[:shards_held]
        assert_reads_all(corpus, folder, documents)
    size = corpus.manifest.shards[0].bytes
    assert max(taken) == shards_held * size, "the bound, and all the room that it gives"
    prefetch(corpus, [])
    finish_fetching(corpus)
    assert not deleted_maps(tmp_path)


def deleted_maps(cache):
    """Shards that this process has mapped although they are no longer in the cache: they keep their space on the disk."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    return [line for line in maps if f"{cache}/" in line and "shard-" in line and "deleted" in line]


def test_maps_of_removed_shards_are_closed(server, folder, tmp_path):
    """Also where nothing is announced: as another shard takes the room."""
    corpus = opened(server, tmp_path, shards_held=1)
    for number in range(SHARDS):
        assert_reads_all(corpus, folder, [number * PER_SHARD])
        assert not deleted_maps(tmp_path)
    held = corpus.tokens((SHARDS - 1) * PER_SHARD, 0, 10)
    assert_reads_all(corpus, folder, [0])
    assert len(deleted_maps(tmp_path)) == 1 and held.any(), "the control: whoever has a view keeps the map"


def test_a_cached_shard_that_somebody_emptied(server, tmp_path):
    corpus = opened(server, tmp_path)
    check(corpus, 0)
    corpus = opened(server, tmp_path)
    (emptied,) = tmp_path.glob("*/shard-000000.tar")
    emptied.write_bytes(b"")
    with pytest.raises(
        CorpusError, match="000000.tar.*: 0 bytes, expected .*; remove the cached file, and it is fetched"
    ):
        check(corpus, 0)
    emptied.unlink()
    check(corpus, 0)


def test_a_cache_that_is_lost_is_reported_before_a_window(server, folder, tmp_path, monkeypatch):
    """Even where all that comes next is in memory: another rank must not wait for this one."""
    local = Corpus.open(folder / "train")
    schedule = LaneSchedule(local.lengths, lanes=2, segment_length=100, epochs=1)
    corpus = opened(server, tmp_path)
    monkeypatch.setattr(windows, "TICKS_AHEAD", 8)
    reader = WindowReader(corpus, schedule, lanes=range(2))
    assert reader.prepare(0, 2) is None
    finish_fetching(corpus)
    for path in tmp_path.iterdir():
        path.rename(tmp_path.with_name("elsewhere"))
    assert reader.prepare(0, 2) is None, "nothing new is asked of the cache"
    monkeypatch.setattr(windows, "TICKS_AHEAD", schedule.ticks)
    assert "data.cache: " in reader.prepare(0, 2)


def test_windows_through_a_small_cache(server, folder, tmp_path, taken):
    """As a run reads: prepared, then read forwards and backwards; the cache holds two shards per lane and one more."""
    local, lanes = Corpus.open(folder / "train"), 2
    corpus = opened(server, tmp_path, shards_held=2 * lanes + 1)
    schedule = LaneSchedule(local.lengths, lanes=lanes, segment_length=100, epochs=1)
    here, there = (WindowReader(it, schedule, lanes=range(lanes)) for it in (local, corpus))
    for tick in range(0, schedule.ticks, 8):
        assert there.prepare(tick, 8) is None
        expected, found = here.window(tick, 8), there.window(tick, 8)
        for t in [*range(8), *reversed(range(8))]:
            assert all(torch.equal(x, y) for x, y in zip(found[t], expected[t], strict=True))
    full = (2 * lanes + 1) * corpus.manifest.shards[0].bytes
    filled = taken.index(full)
    assert set(taken[filled:]) == {full}, (
        "once it is full it stays full: a shard leaves when another one begins to come"
    )
    # Documents of a shard lie apart in the order, so shards come again; but what was fetched stays until it was read.
    assert SHARDS < len(server.shards()) <= SHARDS * PER_SHARD


def test_a_bound_that_is_too_small(server, folder, tmp_path):
    corpus = opened(server, tmp_path, shards_held=2)
    prefetch(corpus, range(4 * PER_SHARD))
    assert_reads_all(corpus, folder, range(2 * PER_SHARD))
    size = corpus.manifest.shards[0].bytes / 2**30
    expected = re.escape(
        f"data.cache_gib: found {2.5 * size:.4g}, expected at least {3 * size:.4g} for the shards of {server.url}/train"
        " that are read at once (3)"
    )
    with pytest.raises(UserError, match=expected):
        check(corpus, 2 * PER_SHARD)
    prefetch(corpus, range(2 * PER_SHARD, 4 * PER_SHARD))  # the control: the same, bit by bit
    assert_reads_all(corpus, folder, range(2 * PER_SHARD, 4 * PER_SHARD))
    with pytest.raises(UserError, match=r"data.cache_gib: .* that are read at once \(1\)"):
        check(opened(server, tmp_path, shards_held=0), 0)


def test_whose_shards_make_room(tmp_path):
    """Two processes announce three shards to a cache of two."""
    sizes = dict.fromkeys("xyz", 10)
    ours, theirs = (ShardCache(tmp_path, sizes, bound=20) for _ in range(2))

    def fetch(cache, name, needed):
        reservation = cache.reserve(name, needed=needed)
        if reservation is not None:
            reservation.path.write_bytes(bytes(sizes[name]))
            reservation.keep()
        return {path.name for path in tmp_path.iterdir()} & set(sizes)

    fetch(ours, "y", needed=True), fetch(ours, "z", needed=True)
    assert theirs.prefetch(["z"]) == [] and ours.prefetch(["y", "x"]) == ["x"]
    assert fetch(ours, "x", needed=False) == {"y", "z"}, "both are needed sooner"
    assert ours.prefetch(["x", "y"]) == ["x"]
    assert fetch(ours, "x", needed=True) == {"x", "y"}, "theirs goes, although ours is needed later"
    assert theirs.prefetch(["z"]) == ["z"], "announced again, it is to be fetched again"
    assert fetch(theirs, "z", needed=False) == {"x", "z"}, "what is needed last goes first"


def test_other_corpora_and_the_living_are_left_alone(server, folder, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "shard-000000.tar").write_bytes(b"of another corpus")
    first = opened(server, tmp_path, shards_held=1)
    first.tokens(0, 0, 10)
    kept = first.tokens(0, 0, 10**9)
    second = opened(server, tmp_path, shards_held=1)
    (place,) = set(tmp_path.iterdir()) - {tmp_path / "other"}
    (place / "shard-000003.tar.partial").write_bytes(b"of a process that was killed")
    (place / "reader-killed.json").write_text('["shard-0000')
    assert_reads_all(second, folder)
    assert np.array_equal(kept, Corpus.open(folder / "train").tokens(0, 0, 10**9))  # its file is gone
    assert_reads_all(first, folder)
    assert (tmp_path / "other" / "shard-000000.tar").read_bytes() == b"of another corpus"
    assert not (place / "shard-000003.tar.partial").exists() and not (place / "reader-killed.json").exists()


# ---- processes -------------------------------------------------------------------------------------------------------


def read_all(url, local, cache, shards_held, seed, opened_one, go, most) -> None:
    """In another process: every document once, in an order of its own. `most`: the most shards in the cache."""
    local = Corpus.open(local)
    size, taken = local.manifest.shards[0].bytes, []
    ShardCache.locked = recording(taken)
    corpus = open_split(url, cache=cache, cache_gib=(shards_held + 0.5) * size / 2**30)
    if not seed:
        prefetch(corpus, [0])
    opened_one.release()
    go.wait()
    order = np.random.default_rng(seed).permutation(len(corpus.lengths))
    for first in range(0, len(order), 4):
        prefetch(corpus, order[first : first + 8])
        for document in order[first : first + 4]:
            check(corpus, document)
            assert np.array_equal(corpus.tokens(document, 0, 10**9), local.tokens(document, 0, 10**9))
    with most.get_lock():
        most.value = max(most.value, max(taken) // size)


PROCESSES = multiprocessing.get_context("forkserver")


def start(server, cache, shards_held, seeds):
    opened_one, go, most = PROCESSES.Semaphore(0), PROCESSES.Event(), PROCESSES.Value("q", 0)
    arguments = f"{server.url}/train", server.folder / "train", cache, shards_held
    readers = [PROCESSES.Process(target=read_all, args=(*arguments, seed, opened_one, go, most)) for seed in seeds]
    for reader in readers:
        reader.start()
    for _ in readers:
        assert opened_one.acquire(timeout=PATIENCE_S)
    return readers, go, most


@pytest.mark.parametrize("shards_held", [SHARDS, 4])
def test_processes_share_a_cache(server, tmp_path, shards_held):
    readers, go, most = start(server, tmp_path, shards_held, seeds=[1, 2])
    assert server.count("train/index.safetensors") == 1
    go.set()
    for reader in readers:
        reader.join(PATIENCE_S)
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert most.value == shards_held, "the bound, and all the room that it gives"
    if shards_held == SHARDS:
        assert sorted(server.shards()) == [shard(number) for number in range(SHARDS)]


def test_a_killed_process_holds_nothing(server, folder, tmp_path):
    """It dies while it fetches; another takes over at once and finds the folder clean."""
    server.faults[shard(0)] = ["stall"]
    (reader,), *_ = start(server, tmp_path, SHARDS, seeds=[0])
    wait_until(lambda: server.shards() and list(tmp_path.glob("*/*.partial")), alive=reader.is_alive)
    reader.kill()
    reader.join()
    assert_reads_all(opened(server, tmp_path), folder)
    assert not list(tmp_path.glob("*/*.partial")) and server.count(shard(0)) == 2


WAIT = """
import sys
import numpy as np
from memformer_dist.data.dataset import Spans
from memformer_dist.data.open_data import open_split
corpus = open_split(sys.argv[1], cache=sys.argv[2])
corpus.prefetch(Spans(*np.array([[0, 3, 6], [0, 0, 0], [9, 9, 9]])))
wait = corpus._shards._changed.wait
corpus._shards._changed.wait = lambda timeout: (print("waits", flush=True), wait(timeout))
print("open", flush=True)
if sys.argv[3] != "nothing":
    corpus.check(Spans(*np.array([[{"a thread": 0, "itself": 23}[sys.argv[3]]], [0], [9]])))
"""


def main_thread_sleeps(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.parametrize("waits_for", ["nothing", "a thread", "itself"])
def test_threads_do_not_keep_a_process(server, tmp_path, waits_for):
    """Ctrl-C ends a program that waits for a shard; one that is through ends although shards are being fetched."""
    for number in range(SHARDS):
        server.faults[shard(number)] = ["stall"] * ALWAYS
    command = [sys.executable, "-c", WAIT, f"{server.url}/train", str(tmp_path), waits_for]
    reader = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "open\n"
    if waits_for == "a thread":
        assert reader.stdout.readline() == "waits\n"
    if waits_for == "itself":
        wait_until(lambda: shard(7) in server.shards(), alive=lambda: reader.poll() is None)
    if waits_for != "nothing":
        # Python may miss a signal that comes just before its main thread begins to wait.
        wait_until(lambda: main_thread_sleeps(reader.pid), alive=lambda: reader.poll() is None)
        reader.send_signal(signal.SIGINT)
    _, told = reader.communicate(timeout=PATIENCE_S)
    assert reader.returncode == (0 if waits_for == "nothing" else -signal.SIGINT)
    assert "try 1" not in told and (told == "") == (waits_for == "nothing")


# ---- a corpus at a URL -----------------------------------------------------------------------------------------------


def test_open_corpora_over_http_and_file(corpus_dir, tmp_path):
    local = open_corpora(corpus_dir)
    with FileServer(corpus_dir) as server:
        for url in (server.url, f"{server.url}/", f"file://{corpus_dir}"):
            corpora = open_corpora(url, cache=tmp_path / "cache")
            for there, here in zip(corpora, local, strict=True):
                assert there.fingerprint == here.fingerprint
                assert there.tokenizer().read_bytes() == (corpus_dir / "tokenizer.model").read_bytes()
                for document in range(len(here.lengths)):
                    check(there, document)
                    assert np.array_equal(there.tokens(document, 0, 10**9), here.tokens(document, 0, 10**9))
        server.faults["tokenizer.model"] = ["flip"] * ALWAYS
        with pytest.raises(CorpusError, match="tokenizer.model: given up after 2 tries: sha256"):
            open_corpora(server.url, cache=tmp_path / "another")
