"""Where programs write: links and mount points are used as they are, and places are tried before the work.

Unless a docstring says otherwise, commit 1e99b32 replaced the link or the folder, or failed after the work.
"""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from memformer_dist.commands import evaluate, generate, train, train_tokenizer
from memformer_dist.errors import UserError
from memformer_dist.files import expect_writable, is_mount_point
from memformer_dist.prepare import build, workspace
from memformer_dist.prepare.build import shard
from memformer_dist.world import World
from tests.helpers import ROOT
from tests.helpers.files import tree


def make(output: Path, model_file: Path, inputs: str, **options):
    return shard(output, model_file, [inputs], **options)


# ---------------------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_followed(tmp_path, model_file, two_files, is_there):
    """--output was a link to a folder on a large disk; the corpus took the place of the link."""
    make(tmp_path / "expected", model_file, two_files)
    target, link = tmp_path / "disk" / "corpora", tmp_path / "link"
    link.symlink_to(target)
    if is_there:
        target.mkdir(parents=True)
    for options in {}, {"overwrite": True}:
        make(link, model_file, two_files, **options)
        assert link.is_symlink() and tree(target) == tree(tmp_path / "expected")
        assert sorted(path.name for path in target.parent.iterdir()) == ["corpora"]


def test_a_tokenizer_behind_a_link(tmp_path, two_files):
    (tmp_path / "link.model").symlink_to(tmp_path / "real.model")
    train_tokenizer.main(
        ["--input", two_files, "--output", f"{tmp_path}/link", "--vocab-size", "900", "--cap-vocabulary"]
    )
    assert (tmp_path / "link.model").is_symlink() and (tmp_path / "real.model").stat().st_size > 1000


# --------------------------------------------------------------------------------------------------------- mount points


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """A folder that behaves as a mount point does: it cannot be renamed, and nothing is renamed to it."""
    folder = tmp_path / "mounted"
    (folder / "lost+found").mkdir(parents=True)
    rename = Path.rename

    def busy(path, target):
        if folder in (path, Path(target)):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", busy)
    monkeypatch.setattr(workspace, "is_mount_point", lambda path: path == folder)
    return folder


def test_a_mount_point_stays(tmp_path, model_file, two_files, mounted):
    """A volume of a container: preparation ended with EBUSY after the work. Control: taken for an ordinary folder."""
    make(tmp_path / "expected", model_file, two_files)
    first = make(mounted, model_file, two_files)
    assert tree(mounted) == tree(tmp_path / "expected")
    assert sorted(path.name for path in mounted.iterdir() if path.name.startswith((".", "lost"))) == ["lost+found"]
    assert make(mounted, model_file, two_files) == first
    make(tmp_path / "other", model_file, two_files, seed=5, partition_mib=1)
    make(mounted, model_file, two_files, seed=5, partition_mib=1, overwrite=True)
    assert tree(mounted) == tree(tmp_path / "other") != tree(tmp_path / "expected")
    assert {path.name for path in tmp_path.iterdir() if ".partial" in path.name} == set()


def test_a_mount_point_taken_for_a_folder(model_file, two_files, mounted, monkeypatch):
    monkeypatch.setattr(workspace, "is_mount_point", lambda path: False)
    with pytest.raises(UserError, match="mounted: Device or resource busy"):
        make(mounted, model_file, two_files)


@pytest.mark.parametrize("overwrite", [False, True])
def test_moving_in_is_interrupted_anywhere(tmp_path, model_file, two_files, mounted, monkeypatch, overwrite):
    """Whatever rename was the last, the same command makes the corpus whole, or finds the old one as it was."""
    options = dict(seed=5, partition_mib=1)
    make(tmp_path / "old", model_file, two_files)
    make(tmp_path / "new", model_file, two_files, **options)
    old, new = tree(tmp_path / "old"), tree(tmp_path / "new")
    rename, stops = Path.rename, 0
    for stop_at in range(100):
        if overwrite and tree(mounted) != old:
            make(mounted, model_file, two_files, overwrite=True)
        left = stop_at

        def fail(path, target):
            nonlocal left
            if mounted in (path.parent, Path(target).parent):  # a part of a corpus leaves or comes
                left -= 1
                if left < 0:
                    raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", fail)
            try:
                make(mounted, model_file, two_files, overwrite=overwrite, **options)
                break
            except KeyboardInterrupt:
                stops += 1
        found = workspace.Workspace.of(mounted)
        found.restore()
        if build.is_corpus(mounted):
            assert {name: raw for name, raw in tree(mounted).items() if not name.startswith(".partial")} in (old, new)
        make(mounted, model_file, two_files, overwrite=overwrite, **options)
        assert tree(mounted) == new
        if not overwrite:
            break
    assert stops >= 1 + 9 * overwrite and tree(mounted) == new


def test_a_folder_in_one_that_may_not_be_written_to(tmp_path, model_file, two_files, monkeypatch):
    """Made for us by an administrator. CORPUS.partial beside it could not be made."""
    (tmp_path / "closed" / "corpus").mkdir(parents=True)
    make(tmp_path / "expected", model_file, two_files)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != f"{tmp_path}/closed" and access(path, mode))
    make(tmp_path / "closed" / "corpus", model_file, two_files)
    assert tree(tmp_path / "closed" / "corpus") == tree(tmp_path / "expected")
    assert [path.name for path in (tmp_path / "closed").iterdir()] == ["corpus"]


def test_a_bind_mount_of_the_kernel(tmp_path, model_file, two_files):
    """Of a folder of the same file system, which os.path.ismount does not see."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "with space").mkdir()
    program = "from memformer_dist.commands.prepare import run; run()"
    check = "import sys; from pathlib import Path; from memformer_dist.files import is_mount_point as mounted; "
    check += "sys.exit(not mounted(Path(sys.argv[1])))"
    script = f"""
        mount --bind '{tmp_path}/disk' '{tmp_path}/with space' || exit 77
        {sys.executable} -c '{check}' '{tmp_path}/with space' || exit 78
        {sys.executable} -c '{program}' --input {two_files} --tokenizer {model_file} --output '{tmp_path}/with space'
    """
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    if done.returncode in (1, 77) and "Operation not permitted" in done.stderr:
        pytest.skip("mounting is not permitted here")
    assert done.returncode == 0, done.stderr
    assert not is_mount_point(tmp_path / "with space")
    make(tmp_path / "expected", model_file, two_files)
    assert tree(tmp_path / "disk") == tree(tmp_path / "expected") and not tree(tmp_path / "with space")


# ---------------------------------------------------------------------------------------------- places are tried first


@pytest.fixture
def no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    return tmp_path / "file" / "inside"


def test_places_are_tried_before_the_work(tmp_path, model_file, two_files, no_folder, trained_run, monkeypatch):
    """One message, before inputs are read and weights are loaded."""
    for module, name in (
        (build, "open_tokenizer"),
        (train_tokenizer, "discover"),
        (evaluate, "open_one"),
        (generate, "open_one"),
    ):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("the work has begun"))
    with pytest.raises(
        UserError, match=f"^--output: cannot write {no_folder}.partial.lock: {no_folder.parent} is not a folder$"
    ):
        make(no_folder, model_file, two_files)
    with pytest.raises(UserError, match=f"^--output: cannot write {no_folder}.model: "):
        train_tokenizer.main(["--input", two_files, "--output", str(no_folder)])
    run = ["--run-dir", str(trained_run)]
    with pytest.raises(UserError, match=f"^--json: cannot write {tmp_path}: Is a directory$"):
        evaluate.main([*run, "--json", str(tmp_path)])
    with pytest.raises(UserError, match=f"^--save: cannot write {tmp_path}: Is a directory$"):
        generate.main([*run, "--prompt", "x", "--save", str(tmp_path)])
    with pytest.raises(UserError, match=f"^--run-dir: cannot write {no_folder}/log.txt: Not a directory$"):
        train.start_log(World(0, 1, torch.device("cpu")), no_folder)


def test_trying_a_place(tmp_path, monkeypatch):
    (tmp_path / "there").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere" / "x")
    for path in tmp_path / "there", tmp_path / "new", tmp_path / "deep" / "new", tmp_path / "link", Path("/dev/null"):
        expect_writable(path, "--save")
    assert (tmp_path / "there").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"there", "link", "deep", "elsewhere"}
    assert not list((tmp_path / "deep").iterdir()) and (tmp_path / "link").is_symlink()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(UserError, match=f"--save: cannot write {tmp_path}/new: No space left on device"):
        expect_writable(tmp_path / "new", "--save")
