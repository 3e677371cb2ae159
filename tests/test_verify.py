"""launch/corpus.py verify: nothing damaged passes, and what is damaged is named by document and byte."""

import hashlib
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from memformer_dist.data.format import SplitWriter
from memformer_dist.errors import UserError
from memformer_dist.inspect.verify import verify
from memformer_dist.prepare.build import shard
from memformer_dist.vocabulary import Vocabulary
from tests.helpers.files import flip
from tests.helpers.scripts import run_script

DOCUMENTS, LENGTH = 30, 300


@pytest.fixture(params=[False, True], ids=["plain", "masked"])
def corpus(tmp_path, request):
    """Two splits of five shards of one size each; every document is of the same length."""
    (tmp_path / "tokenizer.model").write_bytes(b"a tokenizer")
    vocabulary = Vocabulary(size=1000, bos_id=1, eos_id=2, tokenizer_sha256=hashlib.sha256(b"a tokenizer").hexdigest())
    generator = np.random.default_rng(0)
    for name in ("train", "valid"):
        with SplitWriter(
            tmp_path / name, vocabulary, has_mask=request.param, shard_tokens=DOCUMENTS // 5 * LENGTH
        ) as writer:
            for _ in range(DOCUMENTS):
                writer.add(generator.integers(4, 1000, LENGTH))
    return tmp_path


def members(shard):
    with tarfile.open(shard) as tar:
        return tar.getmembers()


def problems(corpus, **options):
    return verify(corpus, **options).problems


@pytest.mark.parametrize("threads", [1, 3])
def test_a_whole_corpus(corpus, threads):
    found = verify(corpus, threads=threads)
    total = sum(path.stat().st_size for path in corpus.glob("*/*.tar"))
    assert found == ([], 10, 2 * DOCUMENTS, 2 * DOCUMENTS * LENGTH, total)
    assert verify(corpus / "valid")[:3] == ([], 5, DOCUMENTS)
    (corpus / "train" / "schedules").mkdir()  # kept there by LaneSchedule
    (corpus / "quarantine.jsonl").write_text("")
    assert problems(corpus) == []


def test_every_flipped_bit_of_a_shard_is_found_and_placed(corpus):
    """Any byte: within a payload it names the document, elsewhere the header or the padding."""
    shard = corpus / "train" / "shard-000002.tar"
    whole, found = shard.read_bytes(), members(shard)
    per_document = len(found) // (DOCUMENTS // 5)
    generator = np.random.default_rng(1)
    for byte in [0, 511, 512, len(whole) - 1, *generator.integers(0, len(whole), 60).tolist()]:
        flip(shard, byte)
        first, *rest = problems(corpus / "train")
        shard.write_bytes(whole)
        assert first.startswith(f"{shard}: sha256 is ") and first.endswith(f" says {hashlib.sha256(whole).hexdigest()}")
        inside = [n for n, m in enumerate(found) if m.offset_data <= byte < m.offset_data + m.size]
        headers = [m for m in found if m.offset <= byte < m.offset_data]
        if inside:
            document = 2 * DOCUMENTS // 5 + inside[0] // per_document
            what = "mask" if found[inside[0]].name.endswith(".mask") else "tokens"
            expected = (
                f"{shard}: the {what} of document {document} at byte {found[inside[0]].offset_data} are damaged: crc32"
            )
            assert len(rest) == 1 and rest[0].startswith(expected)
        elif headers and byte - headers[0].offset < 500:  # behind that a header has bytes that mean nothing
            place = f"{shard}: damage outside of documents: tar header at byte {headers[0].offset}: "
            assert len(rest) == 1 and rest[0].startswith(place)
        elif not headers:
            assert rest == [f"{shard}: damage outside of documents: padding at byte {byte}"]
    assert problems(corpus) == []


def test_all_problems_are_listed(corpus):
    train, valid = corpus / "train", corpus / "valid"
    offsets = [member.offset_data for member in members(train / "shard-000001.tar") if member.name.endswith(".u16")]
    for byte in (offsets[1], offsets[4] + 2 * LENGTH - 1):
        flip(train / "shard-000001.tar", byte)
    (train / "shard-000000.tar").unlink()
    (train / "shard-000003.tar").write_bytes((train / "shard-000004.tar").read_bytes())
    shard = valid / "shard-000001.tar"
    cut = next(member.offset_data for member in members(shard) if member.name.startswith("000001-00000003")) + 100
    shard.write_bytes(shard.read_bytes()[:cut])
    (valid / "shard-000002.tar").write_bytes((valid / "shard-000002.tar").read_bytes() + b"more")
    flip(valid / "index.safetensors", -1)
    (train / "shard-000009.tar.partial").write_bytes(b"")
    (corpus / "tokenizer.model").write_bytes(b"another")
    found = problems(corpus, threads=2)
    patterns = [
        rf"{train}/shard-000009.tar.partial: does not belong to the corpus",
        rf"{corpus}/tokenizer.model: sha256 is \w+, but {train} was made with \w+",
        rf"{train}/shard-000000.tar: missing, expected \d+ bytes",
        rf"{train}/shard-000001.tar: sha256 is \w+, corpus.json says \w+",
        rf"{train}/shard-000001.tar: the tokens of document 7 at byte {offsets[1]} are damaged",
        rf"{train}/shard-000001.tar: the tokens of document 10 at byte {offsets[4]} are damaged",
        rf"{train}/shard-000003.tar: sha256",
        rf"{train}/shard-000003.tar: is another shard, or none: 6 of its 6 documents",
        rf"{valid}/index.safetensors: sha256 is \w+, corpus.json says \w+",
        rf"{corpus}/tokenizer.model: sha256 is \w+, but {valid} was made with",
        rf"{valid}/shard-000001.tar: \d+ bytes, expected \d+ bytes",
        rf"{valid}/shard-000002.tar: \d+ bytes, expected \d+ bytes",
    ]
    assert len(found) == len(patterns)
    for problem, pattern in zip(found, patterns, strict=True):
        assert re.match(pattern, problem), (problem, pattern)


def test_a_shard_that_was_cut_names_the_documents(corpus):
    shard = corpus / "train" / "shard-000001.tar"
    member = next(member for member in members(shard) if member.name == "000001-00000003.u16")
    shard.write_bytes(shard.read_bytes()[: member.offset_data + 100])
    assert problems(corpus)[1:] == [
        f"{shard}: ends in or before the tokens of document 9 at byte {member.offset_data}; documents 9 to 11 are not whole"
    ]


@pytest.mark.parametrize("value", [DOCUMENTS + 1, DOCUMENTS - 1])
def test_figures_of_the_manifest(corpus, value):
    file = corpus / "train" / "corpus.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"documents": value}))
    assert problems(corpus) == [
        f"{file}: documents: {value}, but the index has {DOCUMENTS} and the shards {DOCUMENTS}",
    ]


@pytest.fixture
def prepared(corpus_dir, tmp_path):
    """A corpus that tokenizer/shard.py has made."""
    return Path(shutil.copytree(corpus_dir, tmp_path / "prepared"))


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_what_preparation_recorded(prepared):
    assert problems(prepared) == []
    edit(prepared / "train" / "corpus.json", eos_id=77)
    (prepared / "quarantine.jsonl").write_text("{}\n")
    assert [problem.partition(":")[0] for problem in problems(prepared)] == [
        f"{prepared}/quarantine.jsonl",
        f"{prepared}/train/corpus.json",
    ]
    for damage in b"", b"{}", b"[]", b'{"report": 3}', b"\xff":
        (prepared / "sharding.json").write_bytes(damage)
        assert problems(prepared)[0].startswith(f"{prepared}/sharding.json: is not what preparation wrote")


def test_files_that_were_not_read_are_listed_in_the_corpus(prepared, tmp_path):
    """ignored.jsonl was called a file that does not belong to it."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in "a.txt", "b.txt", "c.png":
        (texts / name).write_text("Bada bidu.\n")
    shard(tmp_path / "corpus", prepared / "tokenizer.model", [str(texts)])
    assert (tmp_path / "corpus" / "ignored.jsonl").exists() and problems(tmp_path / "corpus") == []


def test_a_corpus_without_validation_is_whole(prepared, tmp_path):
    shard(tmp_path / "one", prepared / "tokenizer.model", [str(Path(__file__))], valid_fraction=0)
    assert problems(tmp_path / "one") == []
    shutil.rmtree(prepared / "valid")
    assert problems(prepared) == [f"{prepared}/valid: not found"]


def test_no_corpus(tmp_path):
    with pytest.raises(UserError, match="found no corpus.json and neither train/ nor valid/"):
        verify(tmp_path)
    (tmp_path / "train").mkdir()
    missing = [f"{tmp_path}/valid: not found", f"{tmp_path}/train/corpus.json: not found"]
    assert [problem.partition(";")[0] for problem in problems(tmp_path)] == missing


def test_the_program(corpus_dir, tmp_path):
    done = run_script("launch/corpus.py", "verify", corpus_dir, cold=True)
    assert done.returncode == 0 and re.match(
        rf"{corpus_dir}: whole; \d+ shards, 40 documents, [\d,]+ tokens, [\d.]+ MB in [\d.]+ s \([\d,]+ MB/s\)\n$",
        done.stdout,
    )
    done = run_script("launch/corpus.py", "verify", tmp_path)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith(
        f"error: {tmp_path}: found no corpus.json"
    )
