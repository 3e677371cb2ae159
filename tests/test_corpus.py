"""Shards and their index."""

import hashlib
import io
import json
import re
import tarfile

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from memformer_dist.data import format as shards
from memformer_dist.data.corpus import Corpus
from memformer_dist.data.format import SplitWriter
from memformer_dist.errors import CorpusError, UserError
from tests.helpers.corpora import VOCABULARY, check, write_split


def random_documents(number=20, vocab_size=1000, seed=0):
    generator = np.random.default_rng(seed)
    documents = [generator.integers(4, vocab_size, generator.integers(1, 300)) for _ in range(number)]
    masks = [generator.integers(0, 2, len(document)) for document in documents]
    return documents, masks


@pytest.fixture
def split(tmp_path):
    return write_split(tmp_path / "train", *random_documents(), shard_tokens=800)


@pytest.mark.parametrize("vocab_size, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
@pytest.mark.parametrize("has_mask", [False, True])
def test_reads_back(tmp_path, vocab_size, dtype, has_mask):
    documents, masks = random_documents(vocab_size=vocab_size)
    documents[3][:] = vocab_size - 1
    corpus = Corpus.open(
        write_split(
            tmp_path / "a",
            documents,
            masks if has_mask else None,
            vocabulary=VOCABULARY.model_copy(update={"size": vocab_size}),
            shard_tokens=800,
        )
    )
    assert len(corpus.manifest.shards) > 2 and corpus.lengths.tolist() == list(map(len, documents))
    assert corpus.total_tokens == sum(map(len, documents)) and corpus.has_mask == has_mask
    assert corpus.vocabulary == VOCABULARY.model_copy(update={"size": vocab_size})
    for number, document in enumerate(documents):
        check(corpus, number)
        tokens = corpus.tokens(number, 1, 40)
        assert tokens.dtype == dtype and tokens.tolist() == document[1:40].tolist()
        assert not tokens.flags.owndata and not tokens.flags.writeable
        if has_mask:
            assert corpus.mask(number, 1, 40).tolist() == masks[number][1:40].tolist()


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=30), shard_tokens=st.integers(1, 100))
def test_shards_are_filled_by_tokens(tmp_path_factory, lengths, shard_tokens):
    path = write_split(
        tmp_path_factory.mktemp("corpus") / "a", [np.full(length, 7) for length in lengths], shard_tokens=shard_tokens
    )
    shards = Corpus.open(path).manifest.shards
    assert sum(shard.tokens for shard in shards) == sum(lengths)
    assert sum(shard.documents for shard in shards) == len(lengths)
    assert all(shard.tokens <= shard_tokens or shard.documents == 1 for shard in shards)
    following = 0
    for shard in shards[:-1]:
        following += shard.documents
        assert shard.tokens + lengths[following] > shard_tokens  # it could not have taken the next document


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_webdataset_reads_the_shards(split):
    documents, masks = random_documents()
    corpus = Corpus.open(split)
    urls = [str(split / shard.name) for shard in corpus.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    keys = [f"{n:06d}-{d:08d}" for n, shard in enumerate(corpus.manifest.shards) for d in range(shard.documents)]
    assert [sample["__key__"] for sample in samples] == keys
    for sample, document, mask in zip(samples, documents, masks, strict=True):
        assert np.frombuffer(sample["u16"], "<u2").tolist() == document.tolist()
        assert np.frombuffer(sample["mask"], np.uint8).tolist() == mask.tolist()


def test_same_documents_same_bytes(tmp_path, split):
    again = write_split(tmp_path / "again", *random_documents(), shard_tokens=800)
    other = write_split(tmp_path / "other", *random_documents(seed=1), shard_tokens=800)
    assert sorted(path.name for path in split.iterdir()) == sorted(path.name for path in again.iterdir())
    assert all(path.read_bytes() == (again / path.name).read_bytes() for path in split.iterdir())
    assert Corpus.open(split).fingerprint == Corpus.open(again).fingerprint != Corpus.open(other).fingerprint


def test_hashes_and_manifest_agree_with_the_files(split):
    manifest = json.loads((split / "corpus.json").read_text())
    for shard in manifest["shards"]:
        raw = (split / shard["name"]).read_bytes()
        assert (len(raw), hashlib.sha256(raw).hexdigest()) == (shard["bytes"], shard["sha256"])
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            assert len(tar.getmembers()) == 2 * shard["documents"]
            assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


@pytest.mark.parametrize("name", ["../secret.tar", "/etc/passwd", "folder/a.tar", "..", ".", "", "a\0.tar", "a.tar/"])
def test_a_shard_lies_in_the_folder_of_its_split(split, name):
    manifest = json.loads((split / "corpus.json").read_text())
    shard = split / manifest["shards"][1]["name"]
    (split.parent / "secret.tar").write_bytes(shard.read_bytes())  # of the right size, so that only the name is wrong
    manifest["shards"][1]["name"] = name
    (split / "corpus.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"corpus.json: shards.1.name: found .*plain name of a file"):
        Corpus.open(split)
    shard.rename(split / "renamed..tar")
    manifest["shards"][1]["name"] = "renamed..tar"  # the control
    (split / "corpus.json").write_text(json.dumps(manifest))
    check(Corpus.open(split), 0)


@pytest.mark.parametrize("what, suffix", [("tokens", ".u16"), ("mask", ".mask")])
def test_a_flipped_bit_names_shard_document_and_offset(split, what, suffix):
    shard = split / "shard-000001.tar"
    with tarfile.open(shard) as tar:
        member = next(member for member in tar if member.name.endswith(suffix))
    raw = bytearray(shard.read_bytes())
    raw[member.offset_data] ^= 1
    shard.write_bytes(raw)
    corpus = Corpus.open(split)  # sizes are as they were
    damaged = corpus.manifest.shards[0].documents + int(member.name.split(".")[0].split("-")[1])
    place = f"{re.escape(str(shard))}: the {what} of document {damaged} at byte {member.offset_data} are damaged"
    with pytest.raises(CorpusError, match=place + ": crc32 is .* the index says"):
        check(corpus, damaged)
    for number in set(range(len(corpus.lengths))) - {damaged}:
        check(corpus, number)


def damage_shard(split):
    path = split / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:-1])


def damage_index(split):
    path = split / "index.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def damage_manifest(field, value):
    def damage(split):
        manifest = json.loads((split / "corpus.json").read_text())
        (split / "corpus.json").write_text(json.dumps(manifest | {field: value}))

    return damage


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_shard, r"shard-000001.tar: \d+ bytes, expected \d+ bytes"),
        (lambda split: (split / "shard-000002.tar").unlink(), "shard-000002.tar: missing, expected"),
        (damage_index, "index.safetensors: sha256 is .* corpus.json says"),
        (lambda split: (split / "index.safetensors").unlink(), "index.safetensors: not found"),
        (lambda split: (split / "corpus.json").unlink(), "corpus.json: not found"),
        (lambda split: (split / "corpus.json").write_text("{"), "corpus.json: .*JSON"),
        (damage_manifest("version", 1), "corpus.json: version: found 1; .*2; prepare the corpus again"),
        (damage_manifest("tokens", "many"), "corpus.json: tokens: .*found 'many'"),
        (damage_manifest("token", 1), "corpus.json: token: "),
    ],
)
def test_open_refuses_what_is_not_whole(split, damage, message):
    Corpus.open(split)
    damage(split)
    with pytest.raises(UserError, match=message):
        Corpus.open(split)


def test_nothing_half_written_is_left(tmp_path):
    with pytest.raises(KeyboardInterrupt), SplitWriter(tmp_path / "a", VOCABULARY) as writer:
        writer.add(np.array([5]))
        assert not (tmp_path / "a").exists()
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="no document"):
        SplitWriter(tmp_path / "a", VOCABULARY).close()
    assert not list(tmp_path.iterdir())
    killed = SplitWriter(tmp_path / "a", VOCABULARY)  # a run that is killed leaves what the next one removes
    killed.add(np.array([5]))
    write_split(tmp_path / "a", [np.array([6, 7])])
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and Corpus.open(tmp_path / "a").lengths.tolist() == [2]
    with pytest.raises(UserError, match="exists already"):
        SplitWriter(tmp_path / "a", VOCABULARY)


@settings(deadline=None)
@given(
    name=st.from_regex(r"[0-9]{6}-[0-9]{8,20}\.(u16|u32|mask)", fullmatch=True),
    size=st.one_of(st.integers(0, 10**6), st.integers(0, 8**11 - 1)),
)
def test_headers_are_those_of_tarfile(name, size):
    member = tarfile.TarInfo(name)
    member.size = size
    assert shards._header(name.encode(), size) == member.tobuf(tarfile.USTAR_FORMAT)
