"""How a run was started: starts.jsonl, config.json and tokenizer.model."""

import json
from types import SimpleNamespace

import numpy

from memformer_dist import start


def test_record_of_the_start(tmp_path, monkeypatch):
    run_dir, tokenizer = tmp_path / "run", tmp_path / "some.model"
    run_dir.mkdir()
    tokenizer.write_bytes(b"model")
    config = SimpleNamespace(to_json=lambda: '{"data": {}}', paths={})
    monkeypatch.setattr("sys.argv", ["launch/train.py", "--run-dir", "runs/x"])
    monkeypatch.setenv("PATH", str(tmp_path))
    start.record(run_dir, config, tokenizer, 2, 0)  # on a machine without git
    git = tmp_path / "git"
    for step, script in enumerate(("echo 1a2b3c4-dirty", "echo fatal: not a git repository >&2; exit 128"), start=1):
        git.write_text(f"#!/bin/sh\n{script}\n")
        git.chmod(0o755)
        start.record(run_dir, config, tokenizer, 1, step)
    starts = [json.loads(line) for line in (run_dir / "starts.jsonl").read_text().splitlines()]
    assert [(entry["step"], entry["world_size"], entry["git"]) for entry in starts] == [
        (0, 2, None),
        (1, 1, "1a2b3c4-dirty"),
        (2, 1, None),
    ]
    assert starts[0]["command"][1:] == ["launch/train.py", "--run-dir", "runs/x"]
    versions = starts[0]["versions"]
    assert versions["numpy"] == numpy.__version__ and set(versions) == set(start.PACKAGES)
    assert (run_dir / "config.json").read_text() == '{"data": {}}'
    assert (run_dir / "tokenizer.model").read_bytes() == b"model"
