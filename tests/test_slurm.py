"""launch/slurm/ on a real SLURM of two nodes (tests/helpers/slurm.py): started, stopped in every way, queued again, finished."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.runs import assert_same_run, starts, steps_logged
from tests.helpers.scripts import program_environment, run_script
from tests.helpers.slurm import Cluster, missing
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.full, pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}")]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
SCRIPT = ROOT / "launch" / "slurm" / "train.sbatch"
TOKENS = 6000


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name, value in program_environment().items():
            patch.setenv(name, value)
        patch.setenv("MEMFORMER", str(ROOT))
        patch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        with Cluster.start(tmp_path_factory.mktemp("slurm") / "cluster") as cluster:
            yield cluster


@pytest.fixture
def settings(config, tmp_path) -> Path:
    config["training"]["tokens"] = TOKENS
    config["checkpoint"]["every_tokens"] = 2000
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return path


def submit(cluster: Cluster, settings: Path, run: Path, *options: str, more: tuple = ()) -> str:
    return cluster.submit(*TWO_NODES, *options, SCRIPT, settings, run, *more, cwd=settings.parent)


STOPS = {
    "USR1 to the batch shell, as before the end of the job": lambda cluster, job: cluster.run(
        "scancel", "--batch", "--signal=USR1", job
    ),
    "USR1 to the tasks": lambda cluster, job: cluster.run("scancel", "--signal=USR1", job),
    "scontrol requeue": lambda cluster, job: cluster.run("scontrol", "requeue", job),
    "preemption": lambda cluster, job: cluster.submit(
        "--partition=urgent", "--nodes=2", "--ntasks-per-node=2", "--wrap", "sleep 3"
    ),
}


def test_stopped_in_every_way_it_is_the_same_run(cluster, settings, tmp_path):
    """One job that is stopped four times on its way, against a run of the same two ranks that nobody disturbs."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    job = submit(cluster, settings, run)
    for number, (what, stop) in enumerate(STOPS.items(), start=1):
        # A start that has logged something new has trained, and its successor has something to resume.
        seen = steps_logged(run)
        wait_until(lambda: cluster.state(job) == "RUNNING" and steps_logged(run) > seen + 2)
        stop(cluster, job)
        wait_until(lambda: len(starts(run)) == number + 1)
        assert starts(run)[-1]["job"] == job, what
    assert cluster.wait(job) == "COMPLETED" and cluster.exit_code(job) == 0
    made = starts(run)
    assert [start["launcher"] for start in made] == ["srun"] * 5 and {start["world_size"] for start in made} == {2}
    assert [start["step"] for start in made] == sorted(start["step"] for start in made)

    other = submit(cluster, settings, undisturbed)
    assert cluster.wait(other) == "COMPLETED"
    assert len(starts(undisturbed)) == 1
    assert_same_run(run, undisturbed)


def test_a_cancelled_job_saves_and_stays_cancelled(cluster, settings, tmp_path):
    """Seen while this was written: the batch script queued it again against the user's will."""
    run = tmp_path / "run"
    job = submit(cluster, settings, run, more=("--set", "training.tokens=100000000"))
    wait_until(lambda: steps_logged(run) > 2)
    cluster.run("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    wait_until(lambda: list((run / "checkpoints").glob("step-*")))
    time.sleep(8)  # longer than it takes to be queued again
    assert cluster.state(job) == "CANCELLED" and len(starts(run)) == 1


def test_a_mistake_is_told_once(cluster, settings, tmp_path):
    job = submit(cluster, settings, tmp_path / "run", more=("--set", "mrbp.windw=3"))
    assert cluster.wait(job) == "FAILED" and cluster.exit_code(job) == 2
    log = (tmp_path / f"memformer-{job}.log").read_text()
    assert "mrbp.windw: unknown key" in log and "queued again" not in log


def test_a_run_that_always_fails_gives_up(cluster, settings, tmp_path):
    """Three starts without a new checkpoint. A Python that ends with 1 stands for any fault."""
    broken = tmp_path / "broken" / "launch"
    broken.mkdir(parents=True)
    (broken / "train.py").write_text("raise SystemExit(1)")
    (tmp_path / "run").mkdir()
    job = cluster.submit(
        *TWO_NODES, f"--export=ALL,MEMFORMER={broken.parent}", SCRIPT, settings, tmp_path / "run", cwd=tmp_path
    )
    wait_until(lambda: cluster.state(job) == "FAILED")
    assert cluster.exit_code(job) == 1
    assert len((tmp_path / "run" / "failures").read_text().splitlines()) == 3
    assert "giving up" in (tmp_path / f"memformer-{job}.log").read_text()


def test_it_stops_before_its_job_ends(cluster, settings, tmp_path):
    """The limit is two minutes, and the run is to stop 100 s before it; then it is queued again."""
    run = tmp_path / "run"
    more = ("--set", "training.tokens=100000000", "--set", "checkpoint.before_job_ends_s=80")
    job = submit(cluster, settings, run, "--time=2", "--signal=B:USR2@1", more=more)
    log = tmp_path / f"memformer-{job}.log"
    wait_until(lambda: log.exists() and "stopped by the end of its job in" in log.read_text())
    wait_until(lambda: len(starts(run)) == 2)
    cluster.run("scancel", job)
    cluster.wait(job)


def test_a_batch_shell_is_one_process(cluster, settings, tmp_path):
    """SLURM_NTASKS is 2 there, and nobody else comes."""
    words = f"python {ROOT}/launch/train.py --config {settings} --run-dir {tmp_path}/run --set training.tokens=300"
    job = cluster.submit(*TWO_NODES, "--wrap", words, cwd=tmp_path)
    assert cluster.wait(job) == "COMPLETED"
    assert [start["world_size"] for start in starts(tmp_path / "run")] == [1]


def test_evaluation_under_srun(cluster, trained_run, tmp_path):
    """The figures of a single process."""
    words = ["python", ROOT / "launch/evaluate.py", "--run-dir", trained_run, "--json"]
    cluster.run("srun", *TWO_NODES, *words, tmp_path / "two.json", timeout=200)
    done = run_script("launch/evaluate.py", "--run-dir", trained_run, "--json", tmp_path / "one.json")
    assert done.returncode == 0
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two["eval_loss"] == pytest.approx(one["eval_loss"], rel=1e-6)
