"""The picture of an evaluation: what it needs, and runs of which there is less to draw."""

import sys
from pathlib import Path

import pytest

from launch.draw_evaluation import draw
from memformer_dist.errors import UserError


def test_what_it_needs_is_named(trained_run, tmp_path, monkeypatch):
    """Before anything is read or written. It was a traceback."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"^drawing needs matplotlib: pip install 'memformer_dist\[plot\]'$"):
        draw(trained_run, tmp_path / "it.png")
    assert not list(tmp_path.iterdir())


def test_a_run_without_evaluations_and_places_that_do_not_fit(trained_run, tmp_path):
    """Where matplotlib is installed, which is none of the tests' requirements."""
    pytest.importorskip("matplotlib")
    draw(trained_run, tmp_path / "new" / "it.svg")
    assert (tmp_path / "new" / "it.svg").read_text().startswith("<?xml")
    for output, message in (
        (tmp_path, f"--output: cannot write {tmp_path}: Is a directory"),
        (tmp_path / "it.xyz", "--output: .*'xyz' is not supported"),
        (Path("/dev/null/it.png"), "--output: cannot write /dev/null/it.png"),
    ):
        with pytest.raises(UserError, match=message):
            draw(trained_run, output)
    with pytest.raises(UserError, match=r"--run-dir: found no .*summary.json, expected a finished run"):
        draw(tmp_path, tmp_path / "it.png")
