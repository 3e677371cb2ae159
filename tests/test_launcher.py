"""Which rank a process is, from the variables that real launchers set, and ranks that do not find one another."""

import os

import pytest

from memformer_dist.errors import LaunchError
from memformer_dist.launcher import ALONE, Launch, detect, launch_problems, node_names, tasks_per_node
from tests.helpers.ranks import free_port
from tests.helpers.scripts import run_ranks_of_script

# As SLURM 22.05, MPICH 5.0, Open MPI 4.1, torch 2.13 and DeepSpeed 0.19 set them, for the second process of three.
BATCH_SHELL = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2,1",
}
STEP = BATCH_SHELL | {
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "3", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_RANK": "1",
}
MASTER = {"MASTER_ADDR": "node9", "MASTER_PORT": "1234"}
TORCHRUN = MASTER | {
    "RANK": "1",
    "WORLD_SIZE": "3",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = MASTER | {"RANK": "1", "WORLD_SIZE": "3", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0"}
# mpirun in a batch script: the step is that of Hydra's proxies, one per node.
HYDRAS_STEP = STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
PORT = 15000 + 7 * 64
SRUN = Launch("srun", 1, 3, 1, 2, "node1", PORT, "7")


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, ALONE),
        ({"MASTER_ADDR": "node9"}, ALONE),
        (BATCH_SHELL, ALONE._replace(job="7")),
        (STEP, SRUN),
        (STEP | {"PMI_RANK": "1", "PMI_SIZE": "3", "PMI_FD": "11"}, SRUN),  # srun --mpi=pmi2
        (STEP | {"PMIX_RANK": "1"}, SRUN),  # srun --mpi=pmix
        (STEP | MASTER, SRUN._replace(address="node9", port=1234)),
        (STEP | MASTER | {"WORLD_SIZE": "3"}, SRUN._replace(address="node9", port=1234)),  # of a batch script
        (STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, Launch("srun", 0, 1, 1, 2, job="7")),
        (MPICH, Launch("mpirun (MPICH)", 1, 3, 1, 2)),
        (
            MPICH | {"MPI_LOCALNRANKS": "3"},
            Launch("mpirun (MPICH)", 1, 3, 1, 3, "127.0.0.1", 15000 + os.getppid() % 15000),
        ),
        (HYDRAS_STEP | MPICH, Launch("mpirun (MPICH)", 1, 3, 1, 2, job="7")),
        (MPICH | MASTER | {"WORLD_SIZE": "3", "LOCAL_SIZE": "2"}, Launch("mpirun (MPICH)", 1, 3, 1, 2, "node9", 1234)),
        (OPEN_MPI, Launch("mpirun (Open MPI)", 1, 3, 1, 2)),
        (BATCH_SHELL | OPEN_MPI, Launch("mpirun (Open MPI)", 1, 3, 1, 2, job="7")),
        (TORCHRUN, Launch("torchrun", 1, 3, 1, 2, "node9", 1234)),
        (STEP | TORCHRUN, Launch("torchrun", 1, 3, 1, 2, "node9", 1234, "7")),
        (DEEPSPEED, Launch("deepspeed", 1, 3, 1, 2, "node9", 1234)),
        (MASTER | {"RANK": "1", "WORLD_SIZE": "3"}, Launch("the environment", 1, 3, 0, 1, "node9", 1234)),
        (
            STEP | {"SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "2"},
            SRUN._replace(job="5_2"),
        ),
    ],
)
def test_every_launcher(environment, expected):
    assert detect(environment) == expected


def test_each_rank_of_a_step_has_its_own_numbers():
    ranks = [
        STEP | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": local, "SLURM_NODEID": node}
        for rank, (local, node) in enumerate([("0", "0"), ("1", "0"), ("0", "1")])
    ]
    found = [detect(environment) for environment in ranks]
    assert [(x.rank, x.local_rank, x.local_size) for x in found] == [(0, 0, 2), (1, 1, 2), (2, 0, 1)]
    assert {(x.address, x.port) for x in found} == {("node1", PORT)}


@pytest.mark.parametrize(
    "environment, start",
    [
        (STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE: found 8 in the environment, but srun has started 3 processes"),
        (MPICH | {"WORLD_SIZE": "2"}, "WORLD_SIZE: found 2 in the environment, but mpirun (MPICH) has started 3"),
        (STEP | {"SLURM_PROCID": "x"}, "SLURM_PROCID: found 'x' in the environment, expected a whole number"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": ""}, "OMPI_COMM_WORLD_SIZE: found '' in the environment"),
        (MPICH | {"MASTER_PORT": "http"}, "MASTER_PORT: found 'http' in the environment, expected a port"),
        (BATCH_SHELL | {"WORLD_SIZE": "3"}, "WORLD_SIZE: found 3 in the environment without RANK, MASTER_ADDR"),
    ],
)
def test_what_does_not_fit_together(environment, start):
    """The last: a batch script that exports WORLD_SIZE and forgets srun. Seen: lone runs of one rank each."""
    with pytest.raises(LaunchError) as found:
        detect(environment)
    assert str(found.value).startswith(start) and "\n" not in str(found.value)
    assert list(launch_problems(environment)) == [str(found.value)]


@pytest.mark.parametrize(
    "text, expected",
    [
        ("node1", ["node1"]),
        ("gpu[01-03,7],login", ["gpu01", "gpu02", "gpu03", "gpu7", "login"]),
        ("r[1-2]n[09-10]", ["r1n09", "r1n10", "r2n09", "r2n10"]),
        ("a-b,c-[8-9]-ib", ["a-b", "c-8-ib", "c-9-ib"]),
        ("", []),
    ],
)
def test_names_of_nodes(text, expected):
    assert node_names(text) == expected


def test_tasks_per_node():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    assert tasks_per_node("4") == [4]


# ---- ranks that do not find one another ----------------------------------------------------------------------------------


def start(*ranks: int, size: int, **changes: str) -> list[tuple[int, str]]:
    """Programs that join a process group as these ranks and then find no run -> exit code and message of each."""
    common = {
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "MEMFORMER_RENDEZVOUS_S": "4",
    }
    environments = [common | changes | {"RANK": str(rank)} for rank in ranks]
    done = run_ranks_of_script([("launch/evaluate.py", "--run-dir", "gone")] * len(ranks), environments)
    assert not any("Traceback" in each.stderr for each in done), done
    return [(each.returncode, each.stderr.rpartition("error: ")[2].strip()) for each in done]


def test_missing_ranks_are_named_on_all_that_came():
    port = free_port()
    found = start(0, 2, size=4, MASTER_PORT=port)
    message = f"ranks 1, 3 of 4 have not come to 127.0.0.1:{port} within 4 s (MEMFORMER_RENDEZVOUS_S sets another time)"
    assert found == [(2, message)] * 2


def test_without_rank_0_nobody_waits_for_ever():
    [(code, message)] = start(1, size=2)
    assert (
        code == 2 and message.startswith("MASTER_ADDR, MASTER_PORT: rank 1 on ") and "waited 4 s for rank 0" in message
    )


def test_two_processes_with_the_same_number():
    found = start(0, 1, 1, size=3)
    assert [code for code, _ in found] == [2, 2, 2]
    messages = [message for _, message in found]
    assert any("say that they are rank 1 of 3" in message for message in messages)
    assert any(message.startswith("rank 2 of 3 has not come") for message in messages)


def test_an_address_that_does_not_resolve():
    for code, message in start(0, 1, size=2, MASTER_ADDR="no.such.host.invalid"):
        assert code == 2 and message.startswith("MASTER_ADDR: rank ")
        assert "cannot resolve no.such.host.invalid, where the ranks are to meet" in message


def test_ranks_that_are_complete_go_on():
    """The control: they find no run, together."""
    found = start(0, 1, size=2)
    assert [code for code, _ in found] == [2, 2] and "gone: no checkpoint found" in found[0][1]
