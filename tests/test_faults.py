"""Corpora that are damaged before or while they are read: a clear error, and up to it every segment as it should be.

Each fault meets the reader of training; the control is the same reading without it. The last test is a run over HTTP.
"""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from memformer_dist.data.corpus import Corpus
from memformer_dist.data.format import SplitWriter
from memformer_dist.data.lanes import LaneSchedule
from memformer_dist.data.windows import WindowReader
from memformer_dist.errors import CorpusError, UserError
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.tokenizer import train_tokenizer
from tests.helpers.corpora import VOCABULARY, documents
from tests.helpers.files import flip
from tests.helpers.http import ALWAYS, FileServer
from tests.helpers.scripts import run_script

LANES, LENGTH = 4, 8
SHARDS, PER_SHARD, TOKENS = 6, 5, 100
TICKS = 80  # in which every shard is met
NAME = "shard-000003.tar"  # the one to harm
HARMED = 3 * PER_SHARD + 1  # a document in it


def write(split, seed):
    """Shards of one size whatever the seed, so that only their content tells them apart."""
    generator = np.random.default_rng(seed)
    with SplitWriter(split, VOCABULARY, shard_tokens=PER_SHARD * TOKENS) as writer:
        for _ in range(SHARDS * PER_SHARD):
            writer.add(generator.integers(4, 1000, TOKENS))
    return split


@pytest.fixture
def split(tmp_path):
    return write(tmp_path / "train", seed=0)


@pytest.fixture
def other(tmp_path):
    return write(tmp_path / "other", seed=1)


def reader_of(split):
    corpus = Corpus.open(split)
    schedule = LaneSchedule(corpus.lengths, seed=0, lanes=LANES, segment_length=LENGTH, epochs=1)
    return WindowReader(corpus, schedule, lanes=range(LANES), prefetch=0)


def read(reader, ticks):
    for tick in ticks:
        yield reader.segment(tick)


def equal(one, another):
    return all(torch.equal(x, y) for x, y in zip(one, another, strict=True))


def first_tick_of(reader, documents):
    return next(t for t in range(reader.schedule.ticks) if np.isin(reader.schedule.at(t).document, documents).any())


def flip_tokens(split, other):
    flip(split / NAME, Corpus.open(split).place(HARMED)[1] + 7)


def truncate(split, other):
    os.truncate(split / NAME, 5000)


def remove(split, other):
    (split / NAME).unlink()


def replace(split, other):
    shutil.copyfile(other / NAME, split / NAME)  # in place: the same inode


def rename_over(split, other):
    os.replace(other / NAME, split / NAME)


def index_of_another(split, other):
    shutil.copyfile(other / "index.safetensors", split / "index.safetensors")


def index_and_manifest_of_another(split, other):
    index_of_another(split, other)
    shutil.copyfile(other / "corpus.json", split / "corpus.json")


DAMAGED = r": the tokens of document \d+ at byte \d+ are damaged: crc32 is \w+, the index says \w+$"


@pytest.mark.parametrize(
    "fault, message",
    [
        (flip_tokens, NAME + DAMAGED),
        (replace, NAME + DAMAGED),
        (rename_over, NAME + DAMAGED),
        (index_and_manifest_of_another, r"shard-00000\d.tar" + DAMAGED),
        (truncate, NAME + r": 5000 bytes, expected \d+ bytes$"),
        (remove, NAME + r": missing, expected \d+ bytes$"),
        (index_of_another, r"index.safetensors: sha256 is \w+, corpus.json says \w+$"),
    ],
)
def test_before_the_corpus_is_opened(split, other, fault, message):
    whole = list(read(reader_of(split), range(TICKS)))
    fault(split, other)
    seen = []
    with pytest.raises(UserError, match=f"^{split}/{message}"):
        reader = reader_of(split)
        for segment in read(reader, range(TICKS)):
            seen.append(segment)
    if seen:
        harmed = [HARMED] if fault is flip_tokens else np.arange(3 * PER_SHARD, 4 * PER_SHARD)
        assert len(seen) == first_tick_of(reader, harmed) and all(map(equal, seen, whole))
        assert re.search(message, reader.prepare(0, TICKS)) and reader.prepare(0, len(seen)) is None


@pytest.mark.parametrize(
    "fault, mapped, message",
    [
        (flip_tokens, True, ": was changed while it was read"),
        (flip_tokens, False, DAMAGED),
        (replace, True, ": was changed while it was read"),
        (replace, False, DAMAGED),
        (truncate, True, r": was changed while it was read: it had \d+ bytes, it has 5000"),
        (truncate, False, r": 5000 bytes, expected \d+ bytes; it was whole when the corpus was opened$"),
        (remove, True, None),
        (remove, False, r": missing, expected \d+ bytes; it was whole when the corpus was opened$"),
        (rename_over, True, None),
        (rename_over, False, DAMAGED),
        (index_and_manifest_of_another, True, None),  # they were read when the corpus was opened
    ],
)
def test_while_the_corpus_is_read(split, other, fault, mapped, message):
    """After the shard was met, or before. A file that another one replaces is still there for whoever has it open."""
    whole = list(read(reader_of(split), range(TICKS)))
    reader = reader_of(split)
    met = first_tick_of(reader, np.arange(3 * PER_SHARD, 4 * PER_SHARD))
    seen, ticks = [], iter(range(TICKS))
    if mapped:
        seen += read(reader, [next(ticks) for _ in range(met + 1)])
        assert reader.prepare(0, met + 1) is None
    fault(split, other)
    reader._segments._chunks.clear()  # what was copied out of the shards before is right in any case
    if message is None:
        seen += read(reader, ticks)
        assert len(seen) == TICKS and all(map(equal, seen, whole)) and reader.prepare(0, TICKS) is None
        return
    with pytest.raises(CorpusError, match=f"^{split}/{NAME}{message}"):
        for segment in read(reader, ticks):
            seen.append(segment)
    assert len(seen) < TICKS and all(map(equal, seen, whole))
    assert re.match(f"{split}/{NAME}{message}", reader.prepare(0, TICKS))


def test_chunks_read_before_a_change_stay_right(split, other):
    """Without the clearing of the test above: what is returned is either right or an error."""
    whole = list(read(reader_of(split), range(TICKS)))
    reader = reader_of(split)
    seen = list(read(reader, range(20)))
    replace(split, other)
    with pytest.raises(CorpusError, match="was changed while it was read"):
        for segment in read(reader, range(20, TICKS)):
            seen.append(segment)
        reader.segment(0)
    assert all(map(equal, seen, whole))


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_over_http(config, tmp_path):
    """Through faults that pass; one that does not ends it with code 2, its state saved; once it is mended the run goes on."""
    texts = tmp_path / "texts"
    texts.mkdir()
    written = [text for text in documents(90) if len(text) < 300]  # a few segments each
    for number, text in enumerate(written):
        (texts / f"{number:02d}.txt").write_text(text)
    (tmp_path / "model").write_bytes(train_tokenizer(written, vocab_size=300))
    corpus = tmp_path / "corpus"
    shard(corpus, tmp_path / "model", [str(texts)], valid_fraction=0.25, partition_mib=0.0005)
    train = Corpus.open(corpus / "train")
    schedule = LaneSchedule(train.lengths, seed=0, lanes=4, segment_length=16)
    met = {}  # the tick at which each shard is met first
    for tick in range(20):
        for document in schedule.at(tick).document:
            met.setdefault(train.place(int(document))[0].rpartition("/")[2], tick)
    late = next(name for name in met if met[name] >= 4)
    with FileServer(corpus) as server:
        config["data"] |= {"corpus": server.url, "cache": str(tmp_path / "cache")}
        config |= {"mrbp": {"window": 4}, "checkpoint": {}, "monitor": {}}
        config["training"]["tokens"] = 1400
        (tmp_path / "run.json").write_text(json.dumps(config))
        for name, fault in zip(met, ["drop", "truncate", 503, "flip"], strict=False):
            server.faults[f"train/{name}"] = [fault]
        server.faults[f"train/{late}"] = ["flip"] * ALWAYS
        command = ("launch/train.py", "--config", tmp_path / "run.json", "--run-dir", tmp_path / "run")
        done = run_script(*command)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        message = re.search(r"^error: (.*)$", done.stderr, re.MULTILINE)[1]
        assert re.match(rf"{server.url}/train/{late}: given up after 2 tries: sha256 is \w+, expected \w+", message)
        saved = max((tmp_path / "run" / "checkpoints").iterdir(), key=lambda path: path.name)
        assert saved.name == f"step-{met[late] // 4:08d}"
        server.faults.clear()
        done = run_script(*command)
        assert done.returncode == 0, done.stderr
        assert f"resumed from {saved}" in done.stdout + done.stderr
        asked = [name for name in server.shards() if "/train/" in f"/{name}"]
        assert max(asked.count(f"train/{name}") for name in met if name != late) <= 2
    assert (tmp_path / "run" / "summary.json").exists()
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (tmp_path / "model").read_bytes()
