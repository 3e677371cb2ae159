"""What tests of preparation share: corpora taken apart without our own reader, and tokenizer/shard.py as a program."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import sentencepiece

from tests.conftest import ROOT

SHARD = ROOT / "tokenizer" / "shard.py"


def mib(size: int) -> float:
    """--partition-mib for partitions of so many bytes."""
    return size / 2**20


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_back(split: Path) -> list[list[int]]:
    """The tokens of every document, by tarfile alone."""
    found = []
    for entry in json.loads((split / "corpus.json").read_text())["shards"]:
        with tarfile.open(split / entry["name"]) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".u16"):
                    found.append(np.frombuffer(tar.extractfile(member).read(), "<u2").tolist())
    return found


def encode(model_file: Path, texts: list[str]) -> list[list[int]]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    return [model.encode(text) for text in texts]


def command(output: Path, model_file: Path, *arguments) -> list[str]:
    return [sys.executable, str(SHARD), "--tokenizer", str(model_file), "--output", str(output), *map(str, arguments)]


def run(*command) -> subprocess.CompletedProcess:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
