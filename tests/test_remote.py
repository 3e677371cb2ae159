"""Shards behind a real server that fails: what is read equals the local corpus, or a clear error says why not."""

import errno
import json
import multiprocessing
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from memformer_dist.data import remote, transfer
from memformer_dist.data.corpus import Corpus, CorpusError, open_corpora
from memformer_dist.data.format import SplitWriter
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import UserError
from tests.helpers import ROOT
from tests.helpers.corpora import VOCABULARY, check
from tests.helpers.http import ALWAYS, FileServer

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
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.002)
    monkeypatch.setattr(transfer, "STALL_S", 0.5)
    monkeypatch.setattr(transfer, "TRIES", 5)
    monkeypatch.setattr(remote, "REST_S", 0.5)


def shard(number):
    return f"train/shard-{number:06d}.tar"


def opened(server, cache, shards_held=SHARDS):
    """The corpus through a cache for so many shards."""
    size = json.loads((server.folder / "train" / "corpus.json").read_text())["shards"][0]["bytes"]
    return Corpus.open(f"{server.url}/train", cache=cache, cache_gib=(shards_held + 0.5) * size / 2**30)


def expect(corpus, documents):
    """All of the documents, in the order of need."""
    documents = np.array(list(documents), np.int64)
    corpus.expect(documents, np.zeros_like(documents), corpus.lengths[documents])


def assert_reads_all(corpus, folder, documents=range(SHARDS * PER_SHARD)):
    local = Corpus.open(folder / "train")
    assert corpus.fingerprint == local.fingerprint and corpus.lengths.tolist() == local.lengths.tolist()
    for document in documents:
        check(corpus, document)
        assert np.array_equal(corpus.tokens(document, 0, 10**9), local.tokens(document, 0, 10**9))


def cached(cache):
    return sorted(path.name for path in cache.glob("*/*.tar"))


# ---- faults ----------------------------------------------------------------------------------------------------------


def test_without_faults_everything_is_fetched_once(server, folder, tmp_path, capfd):
    assert_reads_all(opened(server, tmp_path), folder)
    assert sorted(name for name, _ in server.requests) == sorted(
        ["train/corpus.json", "train/index.safetensors", *map(shard, range(SHARDS))]
    )
    assert capfd.readouterr() == ("", "")
    assert_reads_all(opened(server, tmp_path), folder)  # from the cache
    assert [name for name, _ in server.requests[SHARDS + 2 :]] == ["train/corpus.json"]


FAULTS = ["drop", "truncate", 500, 503, "flip", "short", "long", "stall"]


@pytest.mark.parametrize("ahead", [False, True])
def test_what_fails_is_fetched_again(server, folder, tmp_path, capfd, ahead):
    """Every file meets faults of its own; what is read is right all the same, and each retry is told."""
    server.faults["train/corpus.json"] = ["truncate", "short"]
    server.faults["train/index.safetensors"] = ["flip", "drop", 503]
    for number, fault in enumerate(FAULTS):
        server.faults[shard(number)] = [fault] * (1 if fault in ("flip", "long", "stall") else 3)
    corpus = opened(server, tmp_path)
    if ahead:
        expect(corpus, range(SHARDS * PER_SHARD))
    assert_reads_all(corpus, folder)
    told = capfd.readouterr().err.splitlines()
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
def test_a_permanent_fault_is_a_clear_error(server, folder, tmp_path, fault, reason, ahead):
    server.faults[shard(1)] = [fault] * ALWAYS
    corpus = opened(server, tmp_path)
    if ahead:
        expect(corpus, range(SHARDS * PER_SHARD))
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
    time.sleep(remote.REST_S)
    assert_reads_all(corpus, folder)  # once the server is well again


def test_a_stalled_connection_does_not_hang(server, folder, tmp_path):
    server.faults[shard(0)] = ["stall"] * ALWAYS
    corpus = opened(server, tmp_path)
    began = time.monotonic()
    with pytest.raises(CorpusError, match="given up after 5 tries: .*[Tt]imeout"):
        check(corpus, 0)
    assert 2 < time.monotonic() - began < 20


def test_who_waits_for_a_thread_gets_its_error(server, tmp_path, monkeypatch):
    """The shard is being fetched when it is needed: one series of tries, and its error, at once."""
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.1)
    server.faults[shard(0)] = [500] * ALWAYS
    corpus = opened(server, tmp_path)
    expect(corpus, [0])
    with pytest.raises(CorpusError, match="given up after 5 tries"):
        check(corpus, 0)
    assert server.count(shard(0)) == 5
    expect(corpus, [0, 3])  # it is not fetched ahead over and over
    check(corpus, 3)
    assert server.count(shard(0)) == 5


def test_a_full_disk(server, folder, tmp_path, monkeypatch, capfd):
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
    assert capfd.readouterr().err == "" and not list(tmp_path.glob("*/*.tar*"))
    time.sleep(remote.REST_S)
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
        Corpus.open("http://127.0.0.1:9/train", cache=tmp_path)
    with pytest.raises(UserError, match="^nonsense://a/train: Protocol not known: nonsense"):
        Corpus.open("nonsense://a/train", cache=tmp_path)


def test_a_cache_that_cannot_be(server, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=f"data.cache: {tmp_path}/file/.*: Not a directory; expected a folder on a local disk"
    ):
        opened(server, tmp_path / "file")


def test_a_damaged_cache_is_found_out(server, folder, tmp_path):
    """A file that changed in the cache: of another size or with another hash (index) it is fetched again, else its documents are damaged."""
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


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_fetched_ahead_in_the_order_of_need(server, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "FETCHERS", 1)
    corpus = opened(server, tmp_path, shards_held=4)
    order = [5, 2, 7, 1, 0, 3]
    expect(corpus, [number * PER_SHARD + document for number in order for document in range(PER_SHARD)])
    until(lambda: len(cached(tmp_path)) == 4)
    assert server.shards() == [shard(number) for number in order[:4]]  # as many as there is room for
    waited = corpus._shards.wait_s
    assert_reads_all(corpus, folder, [15, 6, 21, 3])
    assert len(server.shards()) == 4 and corpus._shards.wait_s == waited
    expect(corpus, [number * PER_SHARD for number in order[2:]])  # two were passed
    until(lambda: len(server.shards()) == 6 and len(cached(tmp_path)) == 4)
    assert server.shards()[4:] == [shard(0), shard(3)]
    assert cached(tmp_path) == [f"shard-{number:06d}.tar" for number in (0, 1, 3, 7)]


def test_what_is_needed_now_does_not_wait_for_what_is_expected(server, folder, tmp_path):
    """Threads hang at other shards; one that nobody expected is fetched at once."""
    for number in range(4):
        server.faults[shard(number)] = ["hold"]
    corpus = opened(server, tmp_path)
    expect(corpus, range(SHARDS * PER_SHARD))
    until(lambda: len(server.shards()) == remote.FETCHERS)
    assert_reads_all(corpus, folder, [7 * PER_SHARD])
    server.released.set()
    assert_reads_all(corpus, folder)
    assert max(map(server.count, map(shard, range(SHARDS)))) == 1


@pytest.mark.parametrize("shards_held", [1, 2, 3])
def test_the_bound_is_kept_at_all_times(server, folder, tmp_path, shards_held):
    corpus = opened(server, tmp_path, shards_held)
    size, most, done = corpus.manifest.shards[0].bytes, [], threading.Event()

    def sample() -> None:
        while not done.is_set():
            try:
                most.append(sum(path.stat().st_size for path in tmp_path.glob("*/*.tar*")))
            except FileNotFoundError:  # renamed or removed meanwhile
                pass

    sampler = threading.Thread(target=sample)
    sampler.start()
    generator = np.random.default_rng(0)
    try:
        for turn in range(30):
            documents = generator.permutation(SHARDS)[: shards_held + 2] * PER_SHARD
            expect(corpus, documents if turn % 3 else [])
            if turn % 3:
                documents = documents[:shards_held]
            assert_reads_all(corpus, folder, documents)
    finally:
        done.set()
        sampler.join()
    assert 0 < max(most) <= (shards_held + 0.5) * size and len(most) > 100
    expect(corpus, [])
    maps = Path("/proc/self/maps").read_text()
    assert "shard-" not in "".join(line for line in maps.splitlines() if str(tmp_path) in line and "deleted" in line)


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


def test_a_cache_that_is_lost_is_told_before_a_window(server, folder, tmp_path):
    """Also where everything that comes next is in memory: another rank must not wait for this one."""
    local = Corpus.open(folder / "train")
    schedule = LaneSchedule(local.lengths, lanes=2, segment_length=100, epochs=1)
    reader = WindowReader(opened(server, tmp_path), schedule, lanes=range(2))
    assert reader.damage(0, 2, ahead=8) is None
    for path in tmp_path.iterdir():
        path.rename(tmp_path.with_name("elsewhere"))
    assert reader.damage(0, 2) is None
    assert "data.cache: " in reader.damage(0, 2, ahead=schedule.ticks)


def test_windows_through_a_small_cache(server, folder, tmp_path):
    """As a run reads: expected far ahead, checked, read forwards and backwards; the cache holds two shards a lane and one more."""
    local, lanes = Corpus.open(folder / "train"), 2
    corpus = opened(server, tmp_path, shards_held=2 * lanes + 1)
    schedule = LaneSchedule(local.lengths, lanes=lanes, segment_length=100, epochs=1)
    here, there = (WindowReader(it, schedule, lanes=range(lanes)) for it in (local, corpus))
    for tick in range(0, schedule.ticks, 8):
        there.expect(tick, tick + 10**4)
        assert there.damage(tick, tick + 8) is None
        expected, found = here.window(tick, 8), there.window(tick, 8)
        for t in [*range(8), *reversed(range(8))]:
            assert all(torch.equal(x, y) for x, y in zip(found[t], expected[t]))
    assert len(cached(tmp_path)) == 2 * lanes + 1
    assert SHARDS < len(server.shards()) < 4 * SHARDS  # documents of a shard lie apart in the order


def test_a_bound_that_is_too_small(server, folder, tmp_path):
    corpus = opened(server, tmp_path, shards_held=2)
    expect(corpus, range(4 * PER_SHARD))
    assert_reads_all(corpus, folder, range(2 * PER_SHARD))
    size = corpus.manifest.shards[0].bytes / 2**30
    expected = re.escape(
        f"data.cache_gib: found {2.5 * size:.4g}, expected at least {3 * size:.4g}: so much space take the 3 shards"
    )
    with pytest.raises(UserError, match=expected):
        check(corpus, 2 * PER_SHARD)
    expect(corpus, range(2 * PER_SHARD, 4 * PER_SHARD))  # the control: the same, bit by bit
    assert_reads_all(corpus, folder, range(2 * PER_SHARD, 4 * PER_SHARD))
    with pytest.raises(UserError, match="data.cache_gib: .* the 1 shards"):
        check(opened(server, tmp_path, shards_held=0), 0)


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


def read_all(url, local, cache, shards_held, seed, opened_one, go) -> None:
    """In another process: every document once, in an order of its own."""
    size = Corpus.open(local).manifest.shards[0].bytes
    corpus = Corpus.open(url, cache=cache, cache_gib=(shards_held + 0.5) * size / 2**30)
    local = Corpus.open(local)
    if not seed:
        expect(corpus, [0])
    opened_one.release()
    go.wait()
    order = np.random.default_rng(seed).permutation(len(corpus.lengths))
    for first in range(0, len(order), 4):
        expect(corpus, order[first : first + 8])
        for document in order[first : first + 4]:
            check(corpus, document)
            assert np.array_equal(corpus.tokens(document, 0, 10**9), local.tokens(document, 0, 10**9))


PROCESSES = multiprocessing.get_context("forkserver")


def start(server, cache, shards_held, seeds):
    opened_one, go = PROCESSES.Semaphore(0), PROCESSES.Event()
    arguments = f"{server.url}/train", server.folder / "train", cache, shards_held
    readers = [PROCESSES.World(target=read_all, args=(*arguments, seed, opened_one, go)) for seed in seeds]
    for reader in readers:
        reader.start()
    for _ in readers:
        assert opened_one.acquire(timeout=60)
    return readers, go


@pytest.mark.parametrize("shards_held", [SHARDS, 4])
def test_processes_share_a_cache(server, tmp_path, shards_held):
    readers, go = start(server, tmp_path, shards_held, seeds=[1, 2])
    assert server.count("train/index.safetensors") == 1
    most = 0
    go.set()
    deadline = time.monotonic() + 90
    while any(reader.is_alive() for reader in readers):
        assert time.monotonic() < deadline
        most = max(most, len(list(tmp_path.glob("*/*.tar*"))))
    assert [reader.exitcode for reader in readers] == [0, 0]
    assert 0 < most <= shards_held
    if shards_held == SHARDS:
        assert sorted(server.shards()) == [shard(number) for number in range(SHARDS)]


def test_a_killed_process_holds_nothing(server, folder, tmp_path):
    """It dies while it fetches; another takes over at once and finds the folder clean."""
    server.faults[shard(0)] = ["stall"]
    (reader,), _ = start(server, tmp_path, SHARDS, seeds=[0])
    until(lambda: list(tmp_path.glob("*/*.partial")))
    reader.kill()
    reader.join()
    assert_reads_all(opened(server, tmp_path), folder)
    assert not list(tmp_path.glob("*/*.partial")) and server.count(shard(0)) == 2


WAIT = """
import sys
import numpy as np
from memformer_dist.data.corpus import Corpus
corpus = Corpus.open(sys.argv[1], cache=sys.argv[2])
corpus.expect(*np.array([[0, 3, 6], [0, 0, 0], [9, 9, 9]]))
print("open", flush=True)
if sys.argv[3] != "nothing":
    corpus.check(*np.array([[{"a thread": 0, "itself": 23}[sys.argv[3]]], [0], [9]]))
"""


@pytest.mark.parametrize("waits_for", ["nothing", "a thread", "itself"])
def test_threads_do_not_keep_a_process(server, tmp_path, waits_for):
    """Ctrl-C ends a program that waits for a shard; one that is through ends although shards are being fetched."""
    for number in range(SHARDS):
        server.faults[shard(number)] = ["stall"] * ALWAYS
    command = [sys.executable, "-c", WAIT, f"{server.url}/train", str(tmp_path), waits_for]
    reader = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert reader.stdout.readline() == "open\n"
    if waits_for != "nothing":
        until(lambda: shard(0 if waits_for == "a thread" else 7) in server.shards())
        time.sleep(0.3)
        assert reader.poll() is None
        reader.send_signal(signal.SIGINT)
    _, told = reader.communicate(timeout=10)
    assert reader.returncode == (0 if waits_for == "nothing" else -signal.SIGINT)
    assert "try 1" not in told and (told == "") == (waits_for == "nothing")


# ---- a corpus at a URL -----------------------------------------------------------------------------------------------


def test_open_corpora_over_http_and_file(corpus_dir, tmp_path):
    local = open_corpora(corpus_dir)
    with FileServer(corpus_dir) as server:
        for url in (server.url, f"{server.url}/", f"file://{corpus_dir}"):
            corpora = open_corpora(url, cache=tmp_path / "cache")
            for there, here in zip(corpora, local):
                assert there.fingerprint == here.fingerprint
                assert there.tokenizer().read_bytes() == (corpus_dir / "tokenizer.model").read_bytes()
                for document in range(len(here.lengths)):
                    check(there, document)
                    assert np.array_equal(there.tokens(document, 0, 10**9), here.tokens(document, 0, 10**9))
        server.faults["tokenizer.model"] = ["flip"] * ALWAYS
        with pytest.raises(CorpusError, match="tokenizer.model: given up after 2 tries: sha256"):
            open_corpora(server.url, cache=tmp_path / "another")
