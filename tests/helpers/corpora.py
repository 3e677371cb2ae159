"""Texts, tokenizers and corpora for tests; corpora read back without the reader under test."""

import json
import random
import tarfile
from pathlib import Path

import numpy as np
import sentencepiece

from memformer_dist.data.corpus import Corpus
from memformer_dist.data.dataset import Spans
from memformer_dist.data.format import SplitWriter
from memformer_dist.prepare.build import shard
from memformer_dist.prepare.tokenizer import train_tokenizer
from memformer_dist.vocabulary import Vocabulary

EOS = 2
VOCABULARY = Vocabulary(size=1000, bos_id=1, eos_id=EOS, tokenizer_sha256="0" * 64)


def documents(number: int, seed: int = 0) -> list[str]:
    """Words of a small lexicon; every third document is long, some are a word or two."""
    generator = random.Random(seed)
    syllables = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
    lexicon = ["".join(generator.choices(syllables, k=generator.randint(1, 3))) for _ in range(120)]
    sizes = [
        generator.randint(200, 500) if document % 3 == 0 else generator.randint(1, 25) for document in range(number)
    ]
    return [" ".join(generator.choices(lexicon, k=words)).capitalize() + ".\n" for words in sizes]


def make_corpus(folder: Path, vocabulary: int = 400, seed: int = 0) -> Path:
    """folder/corpus, prepared from 40 documents with a tokenizer of their own."""
    texts, model = folder / "texts", folder / "small.model"
    texts.mkdir()
    written = documents(40, seed)
    for number, text in enumerate(written):
        (texts / f"{number:02d}.txt").write_text(text)
    model.write_bytes(train_tokenizer(written, vocab_size=vocabulary))
    shard(folder / "corpus", model, [str(texts)], valid_fraction=0.25)
    return folder / "corpus"


# ---- splits, written token by token ----------------------------------------------------------------------------------


def write_split(path: Path, documents, masks=None, *, vocabulary=VOCABULARY, shard_tokens=10**6) -> Path:
    """A split of these documents (arrays of token ids) and their loss masks; returns `path`."""
    with SplitWriter(path, vocabulary, has_mask=masks is not None, shard_tokens=shard_tokens) as writer:
        for number, document in enumerate(documents):
            writer.add(document, masks and masks[number])
    return path


def random_split(path: Path, lengths, masked=False, seed=0, *, vocabulary=VOCABULARY, shard_tokens=50):
    """A split of random documents of these lengths -> (corpus, documents, masks). Unmasked, the masks are ones."""
    generator = np.random.default_rng(seed)
    documents = [generator.integers(4, 1000, length) for length in lengths]
    masks = [generator.integers(0, 2, length) if masked else np.ones(length, int) for length in lengths]
    write_split(path, documents, masks if masked else None, vocabulary=vocabulary, shard_tokens=shard_tokens)
    return Corpus.open(path), documents, masks


def check(corpus: Corpus, document: int) -> None:
    """Compare a document with its checksum; raises CorpusError where it is damaged."""
    corpus.check(Spans(*np.array([[document], [0], [1]])))


# ---- preparation -----------------------------------------------------------------------------------------------------


def mib(size: int) -> float:
    """--partition-mib for partitions of so many bytes."""
    return size / 2**20


def read_back(split: Path) -> list[list[int]]:
    """The tokens of every document, read by tarfile alone."""
    found = []
    for entry in json.loads((split / "corpus.json").read_text())["shards"]:
        with tarfile.open(split / entry["name"]) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".u16"):
                    found.append(np.frombuffer(tar.extractfile(member).read(), "<u2").tolist())
    return found


def encode(model_file: Path, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, by sentencepiece alone."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    return [model.encode(text) for text in texts]
