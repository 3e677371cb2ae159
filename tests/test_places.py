"""Paths: a run is resumed, evaluated and shown from another folder; ~ is the home folder everywhere, $NAME never.

Commit a736152 read paths from the working folder alone, and took ~ for a name.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

from memformer_dist.checkpoint import open_one
from memformer_dist.commands import corpus, evaluate, generate, prepare, train, train_tokenizer
from memformer_dist.config import RunConfig
from memformer_dist.data.open_data import corpora_from_here
from memformer_dist.errors import UserError
from memformer_dist.inspect.show import open_run
from memformer_dist.places import Places, configured, path_option, path_or_url_option
from tests.helpers.runs import STEP_TOKENS, settings
from tests.helpers.scripts import run_script

INSIDE = "train/corpus.json"


def make_place(folder: Path) -> Path:
    (folder / INSIDE).parent.mkdir(parents=True)
    (folder / INSIDE).touch()
    return folder


def record(run_dir: Path, *places: dict | None) -> Path:
    """starts.jsonl with a start for each of these; None as an earlier version wrote it."""
    run_dir.mkdir(exist_ok=True)
    entries = [{"step": 0} if place is None else {"step": 0, "places": place} for place in places]
    (run_dir / "starts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return run_dir


def test_as_it_is_seen_from_here_and_else_as_it_was_recorded(tmp_path, monkeypatch, caplog):
    run, there = tmp_path / "run", make_place(tmp_path / "there" / "books")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    places = Places.of_run(record(run, None, {"books": "/older"}, {"books": str(there)}, None))
    assert places.find("books", INSIDE) == places.found("data.corpus", "books", INSIDE) == str(there)
    (message,) = caplog.messages
    assert message == f"data.corpus: found no books from here; {there}, where the run has seen it, is used"
    assert places.find("other", INSIDE) == "other"  # nothing is recorded of it
    Path("books").mkdir()  # a folder of that name, but no corpus
    assert places.find("books", INSIDE) == str(there)
    make_place(Path("books"))
    assert places.found("data.corpus", "books", INSIDE) == "books" and len(caplog.messages) == 1
    shutil.rmtree("books")
    shutil.rmtree(there)
    assert places.find("books", INSIDE) == "books"  # so that a message names what was written
    assert Places.of_run(tmp_path / "nowhere").find("books") == "books"
    assert Places.of_run(run / "starts.jsonl").recorded == {}  # no folder: whoever writes there says so
    (run / "starts.jsonl").write_bytes(b'{"places": {"books": \xff}}\n{"places": [3]}\n{"places": {"books": 3}}\n')
    assert Places.of_run(run).recorded == {"books": "3"}


def test_rank_0_alone_says_so(tmp_path, monkeypatch, caplog):
    there = make_place(tmp_path / "there")
    monkeypatch.setenv("RANK", "1")
    assert Places({"x": str(there)}).found("data.corpus", "x", INSIDE) == str(there)
    assert caplog.messages == []


def test_what_is_recorded(tmp_path, monkeypatch):
    """A start from elsewhere does not forget where the corpus is."""
    there = make_place(tmp_path / "there" / "books")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "there")
    paths = {"books": INSIDE, "~/runs/x": "", "https://host/corpus": INSIDE}
    first = Places().seen(paths)
    assert first == {"books": str(there), "~/runs/x": f"{tmp_path}/runs/x"}
    monkeypatch.chdir(tmp_path)
    assert Places(first).seen(paths) == first
    monkeypatch.setenv("HOME", "/nobody")  # another user's home
    make_place(tmp_path / "runs" / "x")
    assert Places(first).find("~/runs/x") == f"{tmp_path}/runs/x"


def test_the_paths_of_a_configuration(config, corpus_dir):
    config["data"]["corpus"] = {str(corpus_dir): 1, f"{corpus_dir}/": 2}
    config["training"]["init_from"] = "~/runs/other"
    expected = {str(corpus_dir): INSIDE, f"{corpus_dir}/": INSIDE, "~/runs/other": ""}
    assert RunConfig.check(config).paths == expected


def test_home_and_variables(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    for read in (lambda text: str(path_option(text)), path_or_url_option, configured):
        assert read("~/books") == "/home/me/books"
        assert read("$HOME/books") == "$HOME/books" and read("a/~/b") == "a/~/b" and read("./~") in ("./~", "~")
    for read in path_or_url_option, configured:
        assert read("https://host/~me/books") == "https://host/~me/books"


def test_every_path_option_knows_the_home_folder(tmp_path, monkeypatch, trained_run, capsys):
    """As after --output=, where the shell leaves ~ alone. Nothing is made in a folder named ~."""
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    shutil.copytree(trained_run, home / "run")
    (home / "texts").mkdir()
    for number in range(4):
        (home / "texts" / f"{number}.txt").write_text(f"Bada bidu number {number}\n")
    (home / "prompt.txt").write_text("Bada")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    train_tokenizer.main(["--input", "~/texts", "--output=~/tok", "--vocab-size", "300", "--cap-vocabulary"])
    shard_it = ["--tokenizer=~/tok.model", "--output=~/corpus", "--workers", "1"]
    prepare.main([*shard_it, "--input", "~/texts/[012].txt", "--valid-input", "~/texts/3.txt"])
    corpus.main(["verify", "~/corpus"])
    corpus.main(["show", "~/corpus", "--lanes", "1"])
    corpus.main(["show", "--run-dir=~/run"])
    generate.main(["--run-dir=~/run", "--prompt-file=~/prompt.txt", "--tokens", "3", "--save=~/saved"])
    generate.main(["--run-dir=~/run", "--continue-from=~/saved", "--tokens", "3"])
    options = train.parse(["--config=~/run/config.json", "--run-dir=~/run"])
    assert train.find_config(options.config) == home / "run" / "config.json" and options.run_dir == home / "run"
    options = evaluate.parse(["--run-dir=~/run", "--corpus=~/corpus", "--json=~/figures.json"])
    assert (options.run_dir, options.corpus) == (home / "run", str(home / "corpus"))
    assert options.json == home / "figures.json"
    assert {path.name for path in home.iterdir()} >= {"tok.model", "corpus", "saved"} and not list(work.iterdir())
    with pytest.raises(UserError, match=r"--tokenizer: found no file \$HOME/tok.model"):
        prepare.main(["--tokenizer=$HOME/tok.model", "--output=x", "--input", "~/texts"])


def test_paths_in_a_configuration_know_the_home_folder(tmp_path, monkeypatch, config, corpus_dir, trained_run):
    """They stay as they were written."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "books").symlink_to(corpus_dir)
    (tmp_path / "run").symlink_to(trained_run)
    config["data"] |= {"corpus": {"~/books": 1, str(corpus_dir): 2}, "cache": "~/cache"}
    config["training"]["init_from"] = "~/run"
    checked = RunConfig.check(config)
    assert list(checked.data.corpora) == ["~/books", str(corpus_dir)] and checked.training.init_from == "~/run"
    assert list(corpora_from_here(checked.data)) == [str(tmp_path / "books"), str(corpus_dir)]
    config["data"]["corpus"] = "$HOME/books"
    with pytest.raises(UserError, match=r"no token shards in \$HOME/books/train"):
        RunConfig.check(config)


def test_a_run_is_shown_from_another_folder(tmp_path, monkeypatch, trained_run, corpus_dir, caplog):
    config = json.loads((trained_run / "config.json").read_text())
    config["data"]["corpus"] = "books"
    run = record(tmp_path / "run", {"books": str(corpus_dir)})
    (run / "config.json").write_text(json.dumps(config))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_run(run, "train")[0].path == f"{corpus_dir}/train"
    assert caplog.messages == [
        f"data.corpus: found no books from here; {corpus_dir}, where the run has seen it, is used"
    ]
    (run / "starts.jsonl").unlink()  # the control
    with pytest.raises(UserError, match="no token shards in books/train"):
        open_run(run, "train")


@pytest.mark.slow
def test_a_run_goes_on_in_another_folder(tmp_path, corpus_dir):
    """Resumed, evaluated, shown and sampled; it was an error, or read a corpus of the same name in that folder."""
    here, there = tmp_path / "here", tmp_path / "there"
    there.mkdir()
    shutil.copytree(corpus_dir, here / "corpora" / "books")
    (here / "config.json").write_text(json.dumps(settings(Path("corpora/books"), tokens=2 * STEP_TOKENS)))
    first = ("launch/train.py", "--config", "config.json", "--run-dir", "run")
    resumed = ("launch/train.py", "--config", "../here/config.json", "--run-dir", "../here/run")
    resumed += ("--set", f"training.tokens={4 * STEP_TOKENS}")
    for command, cwd in (first, here), (resumed, there), (("launch/train.py", "--resume", "../here/run"), there):
        done = run_script(*command, cwd=cwd)
        assert done.returncode == 0, done.stderr
    place = here / "corpora" / "books"
    says = f"data.corpus: found no corpora/books from here; {place}, where the run has seen it, is used"
    assert (here / "run" / "log.txt").read_text().count(says) == 2
    assert json.loads((here / "run" / "config.json").read_text())["data"]["corpus"] == "corpora/books"
    starts = [json.loads(line) for line in (here / "run" / "starts.jsonl").read_text().splitlines()]
    assert [start["places"] for start in starts] == [{"corpora/books": str(place)}] * 3
    for command in (
        ("launch/evaluate.py", "--run-dir", "../here/run", "--json", "figures.json"),
        ("launch/corpus.py", "show", "--run-dir", "../here/run"),
        ("launch/generate.py", "--run-dir", "../here/run", "--prompt", "Bada", "--tokens", "3"),
    ):
        done = run_script(*command, cwd=there)
        assert done.returncode == 0, done.stderr
        assert (says in done.stderr) == ("generate" not in command[0])
    assert json.loads((there / "figures.json").read_text())["corpus"] == f"{place}/valid"
    assert open_one(here / "run").contents.config.data.corpus == "corpora/books"
    assert sorted(os.listdir(there)) == ["figures.json"]
