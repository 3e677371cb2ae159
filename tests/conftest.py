"""Fixtures that several test modules use: a corpus and a tiny configuration, made once per session, and a trained run."""

import copy
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from memformer_dist.prepare.tokenizer import train_tokenizer
from memformer_dist.world import World
from tests.helpers.corpora import documents, make_corpus
from tests.helpers.runs import SEGMENT_LENGTH
from tests.helpers.scripts import run_script


@pytest.fixture(scope="session")
def corpus_dir(tmp_path_factory) -> Path:
    """A CORPUS folder: 30 + 10 documents of 1 to 60 segments, a vocabulary of 400. Not to be written to."""
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def _config(corpus_dir) -> dict:
    return {
        "model": {
            "width": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "heads": 2,
            "feed_forward": 32,
            "slots": 4,
            "dropout": 0.0,
        },
        "data": {"corpus": str(corpus_dir), "lanes": 4, "segment_length": SEGMENT_LENGTH},
        "mrbp": {"window": 2},
        "optimizer": {"learning_rate": 0.01},
        "training": {"tokens": 600},
        "checkpoint": {"every_tokens": 250},
        "monitor": {"log_every_steps": 1},
    }


@pytest.fixture
def config(_config) -> dict:
    """A run of seconds, as it stands in a configuration file; the test may change it."""
    return copy.deepcopy(_config)


@pytest.fixture(scope="session")
def trained_run(_config, tmp_path_factory) -> Path:
    """The run directory of that configuration, trained to the end. Copy it before changing anything."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.json").write_text(json.dumps(_config))
    done = run_script("launch/train.py", "--config", folder / "tiny.json", "--run-dir", folder / "run")
    assert done.returncode == 0, done.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def world() -> World:
    """A process group of this process alone, for what is collective. The environment stays as it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"))
    dist.destroy_process_group()


@pytest.fixture(scope="session")
def model_file(tmp_path_factory) -> Path:
    """A tokenizer of 400 pieces."""
    path = tmp_path_factory.mktemp("model") / "small.model"
    path.write_bytes(train_tokenizer("".join(documents(20)).split("\n"), vocab_size=400, cap_vocabulary=True))
    return path


@pytest.fixture
def two_files(tmp_path):
    for name in "one.txt", "two.txt":
        (tmp_path / name).write_text(f"this is {name}, abcdefg")
    return f"{tmp_path}/*.txt"
