"""Preparation interrupted, killed, out of disk space, or started twice: the same command makes the same bytes."""

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from memformer_dist.errors import UserError
from memformer_dist.inspect.verify import verify
from memformer_dist.prepare import encode as encode_module
from memformer_dist.prepare.build import shard
from tests.helpers import ROOT
from tests.helpers.corpora import documents, mib
from tests.helpers.files import tree
from tests.helpers.scripts import SHARD, program_environment, run_command, shard_command
from tests.helpers.waiting import wait_until

MPIRUN = Path(sys.executable).parent / "mpirun"


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """32 files of about 100 kB: enough to be interrupted in the middle. Not to be written to."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(32):
        (folder / f"{number:02d}.txt").write_text("".join(documents(120, seed=number)))
    return folder


@pytest.fixture(scope="module")
def whole(texts, model_file, tmp_path_factory) -> dict[str, bytes]:
    """The corpus of a run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "corpus"
    shard(folder, model_file, [texts], partition_mib=mib(200_000))
    return tree(folder)


@pytest.mark.slow
def test_interrupted_at_every_file_it_writes(tmp_path, model_file, monkeypatch, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for number, text in enumerate(documents(4)):
        (texts / f"{number}.txt").write_text(text)
    options = dict(partition_mib=mib(1), valid_fraction=0.3)
    shard(tmp_path / "whole", model_file, [texts], **options)
    fsync, left = os.fsync, 0

    def interrupted(descriptor):
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", interrupted)
    for moment in range(100):
        left, output = moment, tmp_path / str(moment)
        try:
            shard(output, model_file, [texts], **options)
            break
        except KeyboardInterrupt:
            assert not output.exists()
        left = 1000
        shard(output, model_file, [texts], **options)
        assert tree(output) == tree(tmp_path / "whole")
        assert not (tmp_path / f"{moment}.partial").exists()
    assert moment > 15
    told = capsys.readouterr().err
    for step in "tokenising", "writing":
        assert f"{step}: 3 of 4 partitions were finished by an earlier run" in told


def until(condition, process) -> None:
    """Wait for it while the process is at work."""
    wait_until(condition, alive=lambda: process.poll() is None)


def partitions_finished(output: Path, step: str = "encoded") -> int:
    return len(list(output.with_name(output.name + ".partial").glob(f"{step}/*.json")))


@pytest.mark.slow
@pytest.mark.parametrize("step, finished", [("encoded", 0), ("encoded", 9), ("shards", 1)])
def test_killed_and_started_again(tmp_path, texts, model_file, whole, step, finished):
    output = tmp_path / "corpus"
    start = shard_command(output, model_file, "--input", texts, "--partition-mib", mib(200_000), "--workers", 2)
    process = subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=program_environment())
    begun = output.with_name("corpus.partial") / "sharding.json"
    until(lambda: begun.exists() and partitions_finished(output, step) >= finished, process)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.communicate()
    assert not output.exists()
    again = run_command(*start)
    assert again.returncode == 0, again.stderr
    assert finished == 0 or "were finished by an earlier run" in again.stderr
    assert tree(output) == whole
    assert not psutil.wait_procs(workers, timeout=5)[1]  # workers do not outlive whom they work for


def workers_of(process) -> list[psutil.Process]:
    """Those that tokenise: children of the server that forks them."""
    return [child for child in psutil.Process(process.pid).children(recursive=True) if child.ppid() != process.pid]


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_program(tmp_path, texts, model_file, whole):
    output = tmp_path / "corpus"
    start = shard_command(output, model_file, "--input", texts, "--partition-mib", mib(200_000), "--workers", 2)
    process = subprocess.Popen(
        start, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=program_environment()
    )
    until(lambda: partitions_finished(output) >= 1, process)
    workers_of(process)[0].kill()
    _, told = process.communicate(timeout=20)
    assert process.returncode == 2 and "a worker process died" in told and "Traceback" not in told
    again = run_command(*start)
    assert "were finished by an earlier run" in again.stderr and tree(output) == whole


@pytest.mark.slow
@pytest.mark.parametrize("workers, interrupt", [(1, os.killpg), (2, os.killpg), (2, os.kill)])
def test_ctrl_c_leaves_what_is_finished(tmp_path, texts, model_file, whole, workers, interrupt):
    """Sent to all as a terminal does, or to the main process alone."""
    output = tmp_path / "corpus"
    start = shard_command(output, model_file, "--input", texts, "--partition-mib", mib(200_000), "--workers", workers)
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(start, **pipes, env=program_environment(), start_new_session=True)
    until(lambda: partitions_finished(output) >= 1, process)
    interrupt(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=20)
    assert process.returncode == 130 and told.strip() == "stopped; the same command resumes"
    again = run_command(*start)
    assert "were finished by an earlier run" in again.stderr and tree(output) == whole


def interrupted(*_, **__):
    raise KeyboardInterrupt


def test_another_recipe_makes_the_shards_anew(tmp_path, texts, model_file, monkeypatch, capsys):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("memformer_dist.prepare.build.merge", interrupted)
        shard(tmp_path / "corpus", model_file, [texts], partition_mib=mib(200_000))
    shard(tmp_path / "corpus", model_file, [texts], partition_mib=mib(200_000), seed=1)
    told = capsys.readouterr().err
    assert "has other seed; its shards are made again" in told and "finished by an earlier run" not in told
    shard(tmp_path / "fresh", model_file, [texts], partition_mib=mib(200_000), seed=1)
    assert tree(tmp_path / "corpus") == tree(tmp_path / "fresh")


def rename_key(record: Path, name: str) -> None:
    text = record.read_text()
    assert '"partition_mib"' in text
    record.write_text(text.replace('"partition_mib"', f'"{name}"'))


@pytest.mark.parametrize("name, known", [("unit_mib", True), ("unit_kib", False)])  # the second is the control
def test_what_was_made_when_partitions_were_called_units(
    tmp_path, texts, model_file, whole, monkeypatch, capsys, name, known
):
    """An interrupted run of that time resumes, and its corpus is recognised."""
    output, options = tmp_path / "corpus", dict(partition_mib=mib(200_000))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("memformer_dist.prepare.build.merge", interrupted)
        shard(output, model_file, [texts], **options)
    rename_key(tmp_path / "corpus.partial" / "sharding.json", name)
    report = shard(output, model_file, [texts], **options)
    told = capsys.readouterr().err
    assert bool(re.search(r"writing: (\d+) of \1 partitions were finished by an earlier run", told)) == known
    assert ("has other partition_mib" in told) != known
    assert tree(output) == whole
    rename_key(output / "sharding.json", name)
    assert verify(output).problems == []
    if known:
        assert shard(output, model_file, [texts], **options) == report
    with pytest.raises(UserError, match="with other partition_mib; --overwrite replaces it"):
        shard(output, model_file, [texts], partition_mib=mib(300_000 if known else 200_000))


def test_a_mended_file_costs_no_other(tmp_path, model_file, capsys):
    """What was tokenised is found again by other inputs and settings."""
    for number, text in enumerate(documents(4)):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "1.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="1.txt: not UTF-8.*resumes there"):
        shard(tmp_path / "corpus", model_file, [f"{tmp_path}/*.txt"], partition_mib=mib(1), strict=True)
    (tmp_path / "1.txt").write_text("mended")
    (tmp_path / "4.txt").write_text("added")
    options = dict(partition_mib=mib(1), strict=True, seed=3)
    shard(tmp_path / "corpus", model_file, [f"{tmp_path}/*.txt"], **options)
    assert "tokenising: 3 of 5 partitions were finished by an earlier run" in capsys.readouterr().err
    shard(tmp_path / "fresh", model_file, [f"{tmp_path}/*.txt"], **options)
    assert tree(tmp_path / "corpus") == tree(tmp_path / "fresh")


def test_other_settings_interrupted_while_tokens_become_shards(tmp_path, model_file, two_files, monkeypatch):
    """Tokens that are in shards already are gone: with the shards of other settings they are made again."""
    for place, seed in ("build.merge", 0), ("encode.tokenise", 1):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(f"memformer_dist.prepare.{place}", interrupted)
            shard(tmp_path / "corpus", model_file, [two_files], seed=seed)
    shard(tmp_path / "corpus", model_file, [two_files], seed=1)
    shard(tmp_path / "fresh", model_file, [two_files], seed=1)
    assert tree(tmp_path / "corpus") == tree(tmp_path / "fresh")


@pytest.mark.parametrize("renames", range(4))
def test_overwriting_interrupted(tmp_path, model_file, two_files, monkeypatch, renames):
    """One of both corpora is there, or the same command brings the new one."""
    output, left = tmp_path / "corpus", renames
    shard(output, model_file, [str(ROOT / "setup.py"), str(SHARD)])
    old, rename, rmtree = tree(output), Path.rename, shutil.rmtree

    def some_renames(path, target):
        nonlocal left
        if output in (path, target):
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        return rename(path, target)

    def then_none_is_removed(path, **options):
        if path == tmp_path / "corpus.partial" and renames < 3:
            raise KeyboardInterrupt
        rmtree(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", some_renames)
        patch.setattr(shutil, "rmtree", then_none_is_removed)
        try:
            shard(output, model_file, [two_files], overwrite=True)
            assert renames == 3
        except KeyboardInterrupt:
            assert renames < 3 and (renames > 0 or tree(output) == old)
    shard(output, model_file, [two_files], overwrite=renames < 2)
    shard(tmp_path / "fresh", model_file, [two_files])
    assert tree(output) == tree(tmp_path / "fresh") and not (tmp_path / "corpus.partial").exists()


def test_tokens_that_were_cut_short_are_not_used(tmp_path, model_file, two_files, monkeypatch):
    def cut(task):
        os.truncate(task.stem.with_suffix(".tokens"), 10)
        return encode_module.write_partition(task)

    monkeypatch.setattr("memformer_dist.prepare.build.write_partition", cut)
    with pytest.raises(UserError, match=r"\.tokens: 10 bytes, expected \d+; remove .*corpus.partial"):
        shard(tmp_path / "corpus", model_file, [two_files])


def test_two_processes_do_not_write_one_corpus(tmp_path, texts, model_file):
    with open(tmp_path / "corpus.partial.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="corpus.partial: another process is working on this corpus"):
            shard(tmp_path / "corpus", model_file, [texts])
    shard(tmp_path / "corpus", model_file, [texts])


# ------------------------------------------------------------------------------------------------------------- MPI


@pytest.mark.slow
def test_under_mpi(tmp_path, texts, model_file, whole):
    start = [MPIRUN, "-iface", "lo", "-n", "3"]
    arguments = "--input", texts, "--partition-mib", mib(200_000)
    done = run_command(*start, *shard_command(tmp_path / "corpus", model_file, *arguments))
    assert done.returncode == 0 and done.stdout.count("padding at 128") == 1, done.stderr
    assert tree(tmp_path / "corpus") == whole
    mistake = run_command(*start, *shard_command(tmp_path / "x", model_file, "--input", tmp_path / "nowhere"))
    assert mistake.returncode == 2 and mistake.stderr.count("nowhere") == 1 and "Traceback" not in mistake.stderr


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_job(tmp_path, texts, model_file, whole):
    output = tmp_path / "corpus"
    start = shard_command(output, model_file, "--input", texts, "--partition-mib", mib(200_000))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen([MPIRUN, "-iface", "lo", "-n", "3", *start], **pipes, env=program_environment())
    until(lambda: partitions_finished(output) >= 1, process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "python" in child.name()]
    ranks[-1].kill()
    told, _ = process.communicate(timeout=20)
    assert process.returncode != 0 and "BAD TERMINATION" in told
    again = run_command(*start)  # without MPI: what is finished is finished
    assert "were finished by an earlier run" in again.stderr and tree(output) == whole


# ------------------------------------------------------------------------------------------------------------ disk


@pytest.fixture
def small_disk(tmp_path):
    """Makes a file system of so many bytes, and gives what makes it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size: int):
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
        if made.returncode:
            pytest.skip("this user may not mount a file system")
        mounted.append(folder)
        return folder, lambda: subprocess.run(["mount", "-o", "remount,size=60m", str(folder)], check=True)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("step, share", [(r"encoded/[0-9a-f]+\.\w+", 0.5), (r"shard-0000\d\d.tar", 1.05)])
def test_a_full_disk(texts, model_file, whole, small_disk, workers, step, share):
    """The message names the file that did not fit; a shard that exists is whole; with more space the command resumes.

    The disk has room for some of the tokens, or for all of them and no shard.
    """
    folder, enlarge = small_disk(int(share * sum(map(len, whole.values()))))
    options = dict(partition_mib=mib(200_000), workers=workers)
    with pytest.raises(UserError, match=rf"cannot write .*{step}: No space.*the same command resumes"):
        shard(folder / "corpus", model_file, [texts], **options)
    assert not (folder / "corpus").exists()
    for path in folder.rglob("*.tar"):
        assert path.read_bytes() == whole[str(path.relative_to(folder / "corpus.partial" / "corpus"))]
    enlarge()
    shard(folder / "corpus", model_file, [texts], **options)
    assert tree(folder / "corpus") == whole
