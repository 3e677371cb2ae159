"""Text in any locale: an ASCII terminal ends no program, files are UTF-8, names of files need not be.

Unless a docstring says otherwise, commit a736152 ended with UnicodeEncodeError, or wrote something else.
"""

import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from memformer_dist import logs
from memformer_dist.config import RunConfig
from memformer_dist.errors import Output, UserError, run_program
from memformer_dist.files import named_in_utf8
from memformer_dist.generate import Generation
from memformer_dist.inspect.verify import verify
from memformer_dist.places import configured, recorded, text_option
from memformer_dist.prepare.build import shard
from tests.helpers.corpora import documents
from tests.helpers.memformer import make
from tests.helpers.runs import STEP_TOKENS, settings
from tests.helpers.scripts import run_script

TEXT = "caf\u00e9 \u6f22\u5b57"
NO_UTF8 = os.fsdecode(b"caf\xe9")  # a name by an old program
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}  # as far as it goes: file names, too


class Terminal(io.TextIOWrapper):
    """A stream in memory."""

    def __init__(self, encoding: str, is_terminal: bool):
        super().__init__(io.BytesIO(), encoding=encoding, write_through=True)
        self.is_terminal = is_terminal

    def isatty(self) -> bool:
        return self.is_terminal

    def written(self) -> bytes:
        return self.buffer.getvalue()


# ---- what is printed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "encoding, is_terminal, set_by_hand, expected",
    [
        ("ascii", True, False, b"caf\\xe9 \\u6f22\\u5b57 \\udce9\n"),
        ("latin-1", True, False, b"caf\xe9 \\u6f22\\u5b57 \\udce9\n"),
        ("utf-8", True, False, TEXT.encode() + b" \\udce9\n"),
        ("ascii", False, False, TEXT.encode() + b" \\udce9\n"),
        ("latin-1", False, False, TEXT.encode() + b" \\udce9\n"),
        ("ascii", False, True, b"caf\\xe9 \\u6f22\\u5b57 \\udce9\n"),
    ],
)
def test_any_text_can_be_printed(monkeypatch, encoding, is_terminal, set_by_hand, expected):
    """Also by a library that got hold of the stream before: DeepSpeed's log has."""
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    if set_by_hand:
        monkeypatch.setenv("PYTHONIOENCODING", encoding)
    stream = Terminal(encoding, is_terminal)
    output = Output.around(stream, lambda error: None)
    for file in output, stream:
        print(TEXT, "\udce9", file=file)
    assert stream.written() == expected * 2
    if encoding == "ascii":
        with pytest.raises(UnicodeEncodeError):  # the control
            print(TEXT, file=Terminal(encoding, is_terminal))


def test_messages_of_programs(monkeypatch, tmp_path):
    """On standard error and in the log of a run."""

    def program():
        print(TEXT)
        raise UserError(f"{TEXT} {NO_UTF8}")

    out, err = Terminal("ascii", True), Terminal("ascii", True)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with pytest.raises(SystemExit) as ended:
        run_program(program, error_log=tmp_path / "log.txt")
    assert ended.value.code == 2 and out.written() == b"caf\\xe9 \\u6f22\\u5b57\n"
    assert err.written() == b"error: caf\\xe9 \\u6f22\\u5b57 caf\\udce9\n"
    assert f"error: {TEXT} caf\\udce9\n".encode() in (tmp_path / "log.txt").read_bytes()


def test_log_lines(monkeypatch, tmp_path):
    """A name that is not UTF-8 was a traceback in the place of the message."""
    err = Terminal("ascii", True)
    monkeypatch.setattr(sys, "stderr", Output.around(err, lambda error: None))
    logs.stop()  # what an earlier test has left
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # without pytest's, whose reports are sent as UTF-8
    logs.start(0, tmp_path / "log.txt")
    logging.getLogger("memformer_dist").info("%s %s", TEXT, NO_UTF8)
    logs.stop()
    assert err.written().endswith(b"rank 0  caf\\xe9 \\u6f22\\u5b57 caf\\udce9\n") and err.written().count(b"\n") == 1
    assert (tmp_path / "log.txt").read_bytes().endswith(f"rank 0  {TEXT} caf\\udce9\n".encode())


def test_messages_between_ranks(world):
    message = f"{TEXT} {NO_UTF8}"
    assert world.broadcast_first(message) == message and world.gather(message) == [message]


# ---- names of files --------------------------------------------------------------------------------------------------


def test_names_in_records_and_on_command_lines(monkeypatch):
    """In a locale of ASCII a name that is UTF-8 has a surrogate for each byte; records have it as UTF-8."""
    assert recorded(TEXT) == configured(TEXT) == text_option(TEXT) == TEXT
    assert configured(recorded(NO_UTF8)) == NO_UTF8 == text_option(NO_UTF8)
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    monkeypatch.setattr(os, "fsdecode", lambda raw: raw.decode("ascii", "surrogateescape"))
    in_ascii = TEXT.encode().decode("ascii", "surrogateescape")
    assert recorded(in_ascii) == text_option(in_ascii) == TEXT and configured(TEXT) == in_ascii
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("latin-1", "surrogateescape"))
    assert text_option("caf\u00e9") == "caf\u00e9"  # as a terminal of Latin-1 has it


def test_documents_with_such_names(tmp_path, model_file, monkeypatch):
    """They were read before; the message about one that cannot be read is new on a standard output of UTF-8."""
    monkeypatch.setattr(sys, "stderr", Output.around(Terminal("utf-8", False), lambda error: None))
    folder = tmp_path / NO_UTF8
    folder.mkdir()
    for number, text in enumerate(documents(4)):
        (folder / f"{number}{NO_UTF8}.txt").write_text(text)
    (folder / f"{NO_UTF8}.png").touch()
    (folder / f"{NO_UTF8}.txt").write_bytes(b"caf\xe9")
    corpus = folder / "corpus"
    for _ in range(2):
        report = shard(corpus, model_file, [str(folder / "*.txt"), str(folder)], exclude=["corpus*"])
        assert (report["unreadable"], report["ignored"]) == (1, 1)
    (listed,) = map(json.loads, (corpus / "quarantine.jsonl").read_text().splitlines())
    assert listed["file"] == str(folder / f"{NO_UTF8}.txt")
    assert verify(corpus).problems == []


def test_a_generation_is_saved_under_any_name(tmp_path):
    cell = make("decoder")
    (tmp_path / NO_UTF8).mkdir()
    for path in tmp_path / NO_UTF8 / "saved", tmp_path / NO_UTF8 / NO_UTF8:
        generation = Generation(cell, eos_id=2)
        generation.feed([[3, 1, 4]])
        generation.save(path)
        assert Generation.load(path, cell, eos_id=2).history == [[3, 1, 4]]


def test_tensors_are_written_and_read_under_any_name(tmp_path):
    folder = tmp_path / NO_UTF8
    folder.mkdir()
    with named_in_utf8(folder / "x.safetensors") as name:
        save_file({"x": torch.ones(2)}, name)
    (folder / "x.safetensors").rename(folder / NO_UTF8)
    for path in folder / NO_UTF8, tmp_path / "plain":
        with named_in_utf8(path) as name:
            assert (name == path) == (path.name == "plain")
            if path.exists():
                assert load_file(name)["x"].tolist() == [1, 1]


def test_a_configuration_is_unicode(config, tmp_path, corpus_dir):
    """A field that JSON cannot hold was found when config.json was written, with a traceback."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    for corpus in NO_UTF8, json.dumps({NO_UTF8: 1}):
        with pytest.raises(UserError, match=r"data.corpus\S*: found 'caf\\udce9', which is not UTF-8, expected text"):
            RunConfig.load(path, [f"data.corpus={corpus}"])


# ---- whole programs --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """A folder \u00e9 with documents of such letters in files of such names, of which one is not UTF-8."""
    folder = tmp_path_factory.mktemp("\u00e9")
    (folder / "t\u00e9xts").mkdir()
    for number, text in enumerate(documents(12)):
        name = f"{number}\u00e9" if number else NO_UTF8
        (folder / "t\u00e9xts" / f"{name}.txt").write_text(f"{text} {TEXT}\r\n")
    return folder


def run_all(folder: Path, *commands: tuple, **environment: str) -> list[bytes]:
    """The output of each, read as bytes; all of them must end well and without a traceback."""
    out = []
    for command in commands:
        done = run_script(*command, cwd=folder, cold=True, **ASCII | environment)
        assert done.returncode == 0 and "Traceback" not in done.stderr + done.stdout, done.stderr
        out.append(done.stdout.encode())
    return out


PREPARE = ("tokenizer/shard.py", "--input", "t\u00e9xts", "--tokenizer", "t\u00f6k.model", "--output", "c\u00f6rpus")
PREPARE += ("--valid-fraction", "0.25", "--workers", "1")


@pytest.mark.slow
def test_preparation_in_an_ascii_locale(texts):
    """Names in its records are those of any other locale, so that the corpus is found again there."""
    train_tokenizer = ("tokenizer/train.py", "--input", "t\u00e9xts", "--output", "t\u00f6k", "--vocab-size", "380")
    shown = run_all(
        texts,
        train_tokenizer,
        PREPARE,
        ("launch/corpus.py", "verify", "c\u00f6rpus"),
        ("launch/corpus.py", "show", "c\u00f6rpus", "--segments", "3"),
        ("launch/corpus.py", "show", "--help"),
    )
    assert b"caf\\xe9 \\u6f22\\u5b57" in shown[3] and b"\\u27e8EOS\\u27e9" in shown[3]
    again = run_script(*PREPARE, cwd=texts)
    assert again.returncode == 0 and "exists already, made of the same files" in again.stdout, again.stderr


@pytest.mark.full
def test_a_run_in_an_ascii_locale(corpus_dir, tmp_path):
    """A corpus with such a name: the first save ended the run. What is written for people to read is UTF-8."""
    shutil.copytree(corpus_dir, tmp_path / "c\u00f6rpus")
    config = settings(Path("c\u00f6rpus"), tokens=2 * STEP_TOKENS)
    (tmp_path / "c\u00f6nfig.json").write_text(json.dumps(config))
    run = ("--run-dir", "r\u00fcn")
    prompt = ("--prompt", f"Bada {TEXT}", "--tokens", "2")
    shown = run_all(
        tmp_path,
        ("launch/train.py", "--config", "c\u00f6nfig.json", *run),
        ("launch/evaluate.py", *run, "--json", "f\u00efgures.json"),
        ("launch/generate.py", *run, *prompt, "--save", "s\u00e4ved"),
    )
    assert json.loads((tmp_path / "f\u00efgures.json").read_bytes())["corpus"] == "c\u00f6rpus/valid"
    assert json.loads((tmp_path / "r\u00fcn" / "starts.jsonl").read_bytes())["places"] == {
        "c\u00f6rpus": str(tmp_path / "c\u00f6rpus")
    }
    assert shown[2].startswith(b"Bada caf\\xe9 \\u6f22\\u5b57")
    piped = run_script("launch/generate.py", *run, *prompt, cwd=tmp_path, cold=True, LC_ALL="C", PYTHONUTF8="0")
    assert piped.stdout.startswith(f"Bada {TEXT}")  # the text alone, as it is
    assert run_script("launch/generate.py", *run, "--continue-from", "s\u00e4ved", cwd=tmp_path).returncode == 0


@pytest.mark.slow
def test_a_run_in_a_folder_whose_name_is_not_utf8(corpus_dir, tmp_path):
    """Its first save was a SafetensorError, and TensorBoard had nothing of it."""
    (tmp_path / "config.json").write_text(json.dumps(settings(corpus_dir, tokens=2 * STEP_TOKENS)))
    run = ("--run-dir", f"{NO_UTF8}/run")
    for command in ("launch/train.py", "--config", "config.json", *run), ("launch/evaluate.py", *run):
        done = run_script(*command, cwd=tmp_path)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    log = (tmp_path / NO_UTF8 / "run" / "log.txt").read_text()
    assert "cannot be written" not in log and list((tmp_path / NO_UTF8 / "run" / "tensorboard").iterdir())
    assert (tmp_path / NO_UTF8 / "run" / "summary.json").exists()
