"""Checkpoints survive kill -9 at any moment, tell damage from what was written, and load at another world size."""

import errno
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import SafetensorError

from memformer_dist import checkpoint, files, saving
from memformer_dist.checkpoint import Checkpoint, Damaged, FileRecord
from memformer_dist.errors import UserError
from memformer_dist.world import World
from tests.helpers.checkpoints import LANES, FakeEngine, assert_of_step, contents, lane_state, names, save
from tests.helpers.files import flip, truncate
from tests.helpers.forks import start_fork
from tests.helpers.ranks import run_ranks
from tests.helpers.toy import ToyCell
from tests.helpers.waiting import wait_until

# ---- out and in ------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded(tmp_path, world):
    assert checkpoint.newest(tmp_path, world) is None
    assert save(tmp_path, world, 3) == tmp_path / "checkpoints" / "step-00000003"
    assert_of_step(checkpoint.newest(tmp_path, world), 3)
    with pytest.raises(AssertionError):
        assert_of_step(checkpoint.newest(tmp_path, world), 4)
    save(tmp_path, world, 12)
    assert_of_step(checkpoint.newest(tmp_path, world), 12)


@pytest.mark.parametrize("file_bytes, files", [(1, 9), (300, 5), (10**6, 1)])
def test_large_models_take_several_files(tmp_path, world, monkeypatch, file_bytes, files):
    monkeypatch.setattr(saving, "FILE_BYTES", file_bytes)
    save(tmp_path, world, 5)
    saved = checkpoint.newest(tmp_path, world)
    assert len(saved.files("weights-")) == len(saved.files("moments-")) == files
    assert_of_step(saved, 5)


@pytest.mark.parametrize("file_bytes", [1, 10**6])
def test_a_frozen_parameter_has_a_weight_and_no_moments(tmp_path, world, monkeypatch, file_bytes):
    """In a file of its own, too, where none of the parameters has moments."""

    class Frozen(FakeEngine):
        def tensors(self):
            for name, weight, moments in super().tensors():
                yield name, weight, {} if name.startswith("embedding") else moments

    monkeypatch.setattr(saving, "FILE_BYTES", file_bytes)
    lanes = world.lanes_of_rank(LANES)
    about = {"contents": contents(5), "lanes": lanes, "state": lane_state(lanes, 5)}
    saving.save(tmp_path, Frozen(ToyCell(), 5), world, **about)
    saved, cell = checkpoint.newest(tmp_path, world), ToyCell()
    saved.load_weights(cell)
    for number, (name, parameter) in enumerate(cell.named_parameters(), start=1):
        assert torch.all(parameter == 5 * number), name
        if not name.startswith("embedding"):
            assert torch.equal(saved.moment(name, "exp_avg"), 10 * parameter), name


def save_rank(world, run_dir):
    save(run_dir, world, 4)
    saved = checkpoint.newest(run_dir, world)
    block = world.lanes_of_rank(LANES)
    state = saved.load_lanes(block, ToyCell().empty_state(len(block)))
    assert all(map(torch.equal, state, lane_state(block, 4)))


def test_lanes_of_two_ranks_load_anywhere(tmp_path, world):
    run_ranks(2, save_rank, tmp_path)
    saved = checkpoint.newest(tmp_path, world)
    assert [path.name for path in saved.files("lanes-")] == [
        "lanes-00000-00004.safetensors",
        "lanes-00004-00008.safetensors",
    ]
    assert_of_step(saved, 4)  # on one rank
    for lanes in [range(first, first + 2) for first in range(0, LANES, 2)] + [range(3, 6)]:  # on four; any others
        state = saved.load_lanes(lanes, ToyCell().empty_state(len(lanes)))
        assert all(map(torch.equal, state, lane_state(lanes, 4)))


def test_states_are_loaded_in_the_precision_of_the_cell(tmp_path, world):
    save(tmp_path, world, 1)
    state = checkpoint.newest(tmp_path, world).load_lanes(range(LANES), ToyCell().double().empty_state(LANES))
    assert state.memory.dtype == torch.float64 and state.seen.dtype == torch.int64


# ---- killed while saving ---------------------------------------------------------------------------------------------


def save_until(run_dir, step, touches, reached) -> None:
    """Save, but stop before change number `touches` of the disk, report it, and wait there to be killed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    world, left, fsync = World(0, 1, torch.device("cpu")), touches, os.fsync

    def touch() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            reached.set()
            threading.Event().wait()

    def audit(event: str, arguments: tuple) -> None:
        written = event == "open" and str(arguments[0]).startswith(str(run_dir)) and arguments[2] & os.O_CREAT
        if written or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"):
            touch()

    sys.addaudithook(audit)
    os.fsync = lambda handle: (touch(), fsync(handle))  # of which there is no audit event
    save(run_dir, world, step)


@pytest.mark.slow
def test_kill_at_any_moment_leaves_a_checkpoint_of_one_step(tmp_path, world, caplog):
    """SIGKILL before every change of the disk that a save makes; each new process resumes from what it finds."""
    context, interrupted = multiprocessing.get_context("forkserver"), 0
    save(tmp_path, world, 1)
    for touches in itertools.count(1):
        reached = context.Event()
        step = checkpoint.newest(tmp_path, world).contents.position.step
        saver = start_fork(save_until, tmp_path, step + 1, touches, reached)
        try:
            wait_until(lambda: reached.is_set() or saver.exitcode is not None)
        finally:
            saver.kill()
            saver.join()
        saved = checkpoint.newest(tmp_path, world)
        found = saved.contents.position.step
        assert_of_step(saved, found)
        if not reached.is_set():
            break
        assert saver.exitcode == -signal.SIGKILL
        assert found in (step, step + 1)
        interrupted += any(name.startswith("partial-") for name in names(tmp_path))
    assert (saver.exitcode, found) == (0, step + 1)
    assert touches > 12
    assert interrupted >= 6
    assert not caplog.records  # whatever has its name is undamaged
    save(tmp_path, world, found + 1)
    assert not any(name.startswith("partial-") for name in names(tmp_path))


class Crash(BaseException):
    pass


def test_a_crash_before_any_write_leaves_a_checkpoint_of_one_step(tmp_path, world, monkeypatch):
    """The same without chance: the n-th touch of the disk does not happen, nor any after it, for every n."""
    touches = [
        (saving, "save_file"),
        (saving, "flush"),
        (Path, "write_text"),
        (Path, "write_bytes"),
        (Path, "mkdir"),
        (Path, "rename"),
        (files.shutil, "rmtree"),
    ]
    save(tmp_path, world, 1)
    save(tmp_path, world, 2)
    left = crash = 0
    completed = False
    while not completed:
        left = crash = crash + 1
        assert crash < 50
        with monkeypatch.context() as patch:
            for owner, name in touches:
                original = getattr(owner, name)

                def touch(*arguments, original=original, **named):
                    nonlocal left
                    left -= 1
                    if left <= 0:
                        raise Crash
                    return original(*arguments, **named)

                patch.setattr(owner, name, touch)
            try:
                save(tmp_path, world, 3)
                completed = True
            except Crash:
                pass
        found = checkpoint.newest(tmp_path, world)
        step = found.contents.position.step
        assert step == 3 if completed else step in (2, 3)
        assert_of_step(found, step)
    assert crash > 12 and names(tmp_path) == ["step-00000002", "step-00000003"]


# ---- what cannot be removed ------------------------------------------------------------------------------------------


def test_what_cannot_be_removed_is_removed_by_a_later_save(tmp_path, world, monkeypatch, caplog):
    """On NFS a folder stays as long as a process has a file of it open. A save that met one ended the run by OSError."""

    def in_use(path, **options):
        for file in path.glob("*.safetensors"):
            file.unlink()
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", in_use)
        (tmp_path / "checkpoints" / "partial-00000003").mkdir(parents=True)
        (tmp_path / "checkpoints" / "partial-00000003" / "lanes-00000-00002.safetensors").write_text("of other ranks")
        for step in (1, 2, 3):
            save(tmp_path, world, step)
            assert_of_step(checkpoint.newest(tmp_path, world), step)
        assert "step-00000001" in names(tmp_path) and "removed-partial-00000003-0" in names(tmp_path)
        first = tmp_path / "checkpoints" / "step-00000001"
        assert (
            f"cannot remove {first} at the moment: {first}: Directory not empty; it is tried again later" in caplog.text
        )
    save(tmp_path, world, 4)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_checkpoint_that_cannot_be_removed_gives_up_its_name(tmp_path, world, monkeypatch):
    """Another folder of the step that is saved, or one that was damaged before."""
    for step in (1, 2):
        save(tmp_path, world, step)
    with monkeypatch.context() as patch:
        patch.setattr(
            files.shutil, "rmtree", lambda path: (_ for _ in ()).throw(OSError(errno.EBUSY, "Busy", str(path)))
        )
        for _ in range(2):
            save(tmp_path, world, 2)
            flip(tmp_path / "checkpoints" / "step-00000002" / "checkpoint.json")
            assert_of_step(checkpoint.newest(tmp_path, world), 1)
        assert "removed-damaged-step-00000002-0" in names(tmp_path)
    save(tmp_path, world, 3)
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001", "step-00000003"]


def test_an_anchor_that_cannot_be_read_at_the_moment_is_kept(tmp_path, world, monkeypatch, caplog):
    """It was taken for one that nothing could resume from, and removed."""
    read_bytes = Path.read_bytes

    def stale(path):
        if path.parent.name == "step-00000001":
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read_bytes(path)

    save(tmp_path, world, 1, anchor=True)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        for step in (2, 3, 4):
            save(tmp_path, world, step)
    assert "step-00000001: is kept for the time being, since it cannot be read: Stale file handle" in caplog.text
    save(tmp_path, world, 5)
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("what", ["weights-", "moments-", "lanes-"])
def test_nothing_of_a_checkpoint_stays_open(tmp_path, world, what):
    """The run that resumed from it kept its files mapped."""
    saved, cell = Checkpoint(save(tmp_path, world, 1)), ToyCell()
    saved.verify()
    saved.load_weights(cell)
    kept = [saved.moment(name, "exp_avg") for name, _ in cell.named_parameters()]
    state = saved.load_lanes(range(LANES), cell.empty_state(LANES))
    assert kept and state and saved.contents
    assert what not in Path("/proc/self/maps").read_text()
    open_files = [os.path.realpath(entry.path) for entry in os.scandir("/proc/self/fd")]
    assert not any(path.startswith(str(tmp_path)) for path in open_files)


# ---- damage ----------------------------------------------------------------------------------------------------------


def append(path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


FILES = ("weights-00000.safetensors", "moments-00000.safetensors", "lanes-00000-00008.safetensors", "checkpoint.json")
DAMAGES = {f"{damage.__name__} {name}": (name, damage) for name in FILES for damage in (flip, truncate, append)}
DAMAGES |= {f"lose {name}": (name, lambda path: path.unlink()) for name in (*FILES, "manifest.json")}
DAMAGES |= {"flip manifest.json": ("manifest.json", flip), "truncate manifest.json": ("manifest.json", truncate)}
DAMAGES |= {"empty manifest.json": ("manifest.json", lambda path: path.write_text(""))}
DAMAGES |= {"strange manifest.json": ("manifest.json", lambda path: path.write_text("[]"))}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, world, damage, caplog):
    for step in (1, 2):
        save(tmp_path, world, step)
    name, harm = DAMAGES[damage]
    harm(tmp_path / "checkpoints" / "step-00000002" / name)
    assert_of_step(checkpoint.newest(tmp_path, world), 1)
    (warning,) = caplog.messages
    folder = tmp_path / "checkpoints"
    assert warning.startswith(f"skipping damaged checkpoint: {folder / 'step-00000002' / name}: ")
    assert warning.endswith(f" (moved to {folder / 'damaged-step-00000002'})")
    assert names(tmp_path) == ["damaged-step-00000002", "step-00000001"]
    assert_of_step(checkpoint.newest(tmp_path, world), 1)
    assert len(caplog.records) == 1  # once is enough


def test_no_flipped_bit_of_the_manifest_goes_unnoticed(tmp_path, world):
    manifest = save(tmp_path, world, 1) / "manifest.json"
    whole = manifest.read_bytes()
    for place in range(len(whole)):
        flip(manifest, place)
        with pytest.raises(Damaged):
            Checkpoint(manifest.parent).verify()
        manifest.write_bytes(whole)
    Checkpoint(manifest.parent).verify()


def test_a_step_that_is_damaged_twice(tmp_path, world):
    """The run resumes from the one before, reaches the step again, and has bad luck again."""
    save(tmp_path, world, 1)
    for _ in range(2):
        truncate(save(tmp_path, world, 2) / FILES[0])
        assert_of_step(checkpoint.newest(tmp_path, world), 1)
    save(tmp_path, world, 2)
    assert_of_step(checkpoint.newest(tmp_path, world), 2)


def test_where_all_are_damaged_the_run_does_not_start_afresh(tmp_path, world):
    for step in (1, 2):
        flip(save(tmp_path, world, step) / FILES[step])
    for _ in range(3):  # not when the same command is given again, either
        with pytest.raises(UserError, match=f"{tmp_path / 'checkpoints'}: every checkpoint is damaged"):
            checkpoint.newest(tmp_path, world)
    with pytest.raises(UserError, match="no checkpoint found"):
        checkpoint.open_one(tmp_path)


def test_an_interrupted_save_is_no_checkpoint(tmp_path, world):
    partial = tmp_path / "checkpoints" / "partial-00000009"
    partial.mkdir(parents=True)
    (partial / "checkpoint.json").write_text("{")
    assert checkpoint.newest(tmp_path, world) is None
    save(tmp_path, world, 1)
    assert names(tmp_path) == ["step-00000001"]


def rewrite(path, change) -> None:
    """Change checkpoint.json as another version of the program might have written it, manifest included."""
    raw = json.loads((path / "checkpoint.json").read_text())
    change(raw)
    (path / "checkpoint.json").write_text(json.dumps(raw))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["checkpoint.json"] = FileRecord.of(path / "checkpoint.json").model_dump()
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_from_before_there_were_curricula(tmp_path, world):
    def before(raw: dict) -> None:
        del raw["curriculum"], raw["readout_group"], raw["interval"]["ticks"]
        raw["config"]["mrbp"] = {"window": 2, "readout_group": 1, "lanes_per_group": None}

    rewrite(save(tmp_path, world, 1), before)
    found = checkpoint.newest(tmp_path, world).contents
    assert found.curriculum is None and found.readout_group is None
    assert found.config.mrbp.window == 2 and found.config.mrbp.reduce == "window"


def test_a_whole_checkpoint_of_another_version_is_not_called_damaged(tmp_path, world):
    """It stays where it is: an older program can still read it."""

    def rename(raw: dict) -> None:
        raw["config"]["mrbp"]["renamed"] = raw["config"]["mrbp"].pop("window")

    rewrite(save(tmp_path, world, 1), rename)
    message = "checkpoint.json: was written by another version of this program: config.mrbp.window: missing"
    with pytest.raises(UserError, match=message):
        _ = checkpoint.newest(tmp_path, world).contents
    assert names(tmp_path) == ["step-00000001"]


# ---- which are kept --------------------------------------------------------------------------------------------------


def test_the_newest_and_the_anchors_are_kept(tmp_path, world):
    for step in range(1, 9):
        save(tmp_path, world, step, anchor=step in (2, 5))
    assert names(tmp_path) == [f"step-{step:08d}" for step in (2, 5, 7, 8)]
    save(tmp_path, world, 9, keep=3)
    assert names(tmp_path) == [f"step-{step:08d}" for step in (2, 5, 7, 8, 9)]


@pytest.mark.parametrize("lost", ["manifest.json", "checkpoint.json"])
def test_an_interrupted_removal_is_completed(tmp_path, world, lost):
    for step in (1, 2):
        save(tmp_path, world, step)
    (tmp_path / "checkpoints" / "step-00000001" / lost).unlink()
    save(tmp_path, world, 3)
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


# ---- what cannot be written ------------------------------------------------------------------------------------------


def full_disk_rank(world, folder) -> None:
    """No room, for each of the files in turn, on rank 0 or, for its lanes, on rank 1: both end with the same message."""
    save(folder, world, 1)
    for rank, file in (
        (0, "weights"),
        (0, "moments"),
        (0, "checkpoint.json"),
        (0, "manifest.json"),
        (1, "lanes-00004"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            write_file, write_bytes = saving.save_file, Path.write_bytes

            def full(path) -> None:
                if world.rank == rank and file in str(path):
                    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

            def full_of_bytes(path, content) -> None:
                if world.rank == rank and file in str(path):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                write_bytes(path, content)

            patch.setattr(saving, "save_file", lambda tensors, path: (full(path), write_file(tensors, path)))
            patch.setattr(Path, "write_bytes", full_of_bytes)
            with pytest.raises(UserError) as caught:
                save(folder, world, 2)
        assert re.fullmatch(
            rf"rank {rank} on \S+: \S+/partial-00000002: the checkpoint cannot be saved: No space left on device",
            str(caught.value),
        ), caught.value
        dist.barrier()
        assert names(folder) == ["step-00000001"], file
        dist.barrier()  # before a rank that was quicker begins the next save
    save(folder, world, 2)
    assert names(folder) == ["step-00000001", "step-00000002"]
    assert_of_step(checkpoint.newest(folder, world), 2)


def test_a_checkpoint_that_cannot_be_written_ends_all_ranks(tmp_path):
    """One rank's traceback left the others waiting; the disk has its room again, and what was there stays."""
    run_ranks(2, full_disk_rank, tmp_path)
