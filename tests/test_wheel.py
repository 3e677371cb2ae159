"""The package installed from a wheel, without a clone: from text to a sample by its console entry points."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import memformer_dist
from tests.helpers import ROOT
from tests.helpers.corpora import documents
from tests.helpers.scripts import program_environment

PARTS = ("memformer_dist", "configs", "setup.py", "pyproject.toml", "README.md", "LICENSE")
BUILD = "from setuptools.build_meta import build_wheel; import sys; print(build_wheel(sys.argv[1]))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: building writes into the folder."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for part in PARTS:
        if (ROOT / part).is_dir():
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / part, source / part)
    done = subprocess.run([sys.executable, "-c", BUILD, folder], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.full
def test_a_wheel_has_every_module_and_configuration_and_nothing_else(wheel):
    assert wheel.name == f"memformer_dist-{memformer_dist.__version__}-py3-none-any.whl"
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "memformer_dist").rglob("*.py")}
    configs = {f"memformer_dist/configs/{path.name}" for path in (ROOT / "configs").glob("*.json")}
    assert names == modules | configs and len(configs) > 3


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """installed(program, *arguments): run a program of a virtual environment that sees this one's other packages."""
    folder = tmp_path_factory.mktemp("installed")
    environment, elsewhere = folder / "venv", folder / "empty"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    python = environment / "bin" / "python"
    (packages,) = (environment / "lib").glob("python*/site-packages")
    present = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "present.pth").write_text("\n".join(present) + "\n")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--ignore-installed", wheel], check=True
    )

    def run(program: str, *arguments: object) -> subprocess.CompletedProcess:
        variables = program_environment() | {"PATH": f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"}
        del variables["PYTHONPATH"]  # the clone
        done = subprocess.run(
            [environment / "bin" / program, *map(str, arguments)],
            cwd=elsewhere,
            env=variables,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return done

    run.folder = elsewhere
    run.packages = packages
    return run


@pytest.mark.full
def test_from_text_to_a_sample_in_an_empty_folder(installed):
    code = "import memformer_dist, memformer_dist.train as train; print(memformer_dist.__file__, train.__file__)"
    for place in installed("python", "-c", code).stdout.split():
        assert Path(place).is_relative_to(installed.packages)

    texts = installed.folder / "texts"
    texts.mkdir()
    for number, text in enumerate(documents(30)):
        (texts / f"{number}.txt").write_text(text)
    installed(*("memformer-train-tokenizer", "--input", texts, "--output", "small", "--vocab-size", 400))
    installed(*("memformer-prepare", "--input", texts, "--tokenizer", "small.model", "--output", "corpus"))
    assert "whole" in installed("memformer-corpus", "verify", "corpus").stdout

    tiny = {
        "model": {"width": 16, "heads": 2, "feed_forward": 32, "slots": 4, "encoder_layers": 1, "decoder_layers": 1}
    }
    tiny |= {"data": {"corpus": "corpus", "lanes": 4, "segment_length": 16}, "training": {"tokens": 500}}
    changes = [f"{section}.{name}={value}" for section, fields in tiny.items() for name, value in fields.items()]
    options = [word for change in changes for word in ("--set", change)]
    for name, run_dir in (("quickstart", "runs/quickstart"), ("configs/small.json", "runs/small")):
        installed("memformer-train", "--config", name, *options)  # no such file: one of the installed configurations
        summary = json.loads((installed.folder / run_dir / "summary.json").read_text())
        assert summary["tokens"] >= 500
    report = installed("memformer-evaluate", "--run-dir", "runs/quickstart", "--json", "figures.json")
    assert "memory carried" in report.stdout
    figures = json.loads((installed.folder / "figures.json").read_text())
    expected = json.loads((installed.folder / "runs/quickstart/summary.json").read_text())
    assert figures["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4)
    written = installed("memformer-generate", "--run-dir", "runs/quickstart", "--prompt", "Bada", "--tokens", 5)
    assert written.stdout.startswith("Bada")
