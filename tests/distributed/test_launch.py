"""What a launcher's environment is read as, and what is said of one that no launcher made."""

from __future__ import annotations

import os
import socket

import pytest

from deepvit_train.distributed.launch import NEEDED, OTHERS, Launch, local_rank, read_launch
from deepvit_train.distributed.world import start, stop
from deepvit_train.error import ConfigError, UserError
from tests.conftest import as_ranks, free_port

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*NEEDED, "LOCAL_RANK", *OTHERS):
        monkeypatch.delenv(name, raising=False)


def launched(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> Launch:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return read_launch()


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": ""},
        {"WORLD_SIZE": "1"},
        {"RANK": "0"},
        {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"},
        {"MASTER_PORT": "no number"},  # nobody reads it
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"},  # a batch script, which runs once
        {"OMPI_COMM_WORLD_SIZE": "1"},
    ],
)
def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> None:
    launch = launched(monkeypatch, environment)
    assert (launch.rank, launch.size) == (0, 1)


def test_ranks_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_PROCID": "1", **MEETING}
    assert launched(monkeypatch, said) == Launch(3, 4, "127.0.0.1", 29500)
    assert local_rank() == 1


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but RANK, MASTER_ADDR, MASTER_PORT are not"),
        ({"WORLD_SIZE": "4", "RANK": "0", "MASTER_ADDR": "x"}, "but MASTER_PORT is not"),
        ({"RANK": "1"}, "RANK=1 is set, but WORLD_SIZE is not"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2 is set, but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc in the environment: must be a whole number from 1 on"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE=-2"),
        ({"WORLD_SIZE": "²"}, "WORLD_SIZE=²"),
        ({"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x"),
        ({"WORLD_SIZE": "2", "RANK": "2", **MEETING}, "RANK=2: must be less than WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "0", **MEETING, "MASTER_PORT": "99999"}, "MASTER_PORT=99999"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: mpirun started several copies"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE=2: mpiexec started"),
        ({"SLURM_STEP_NUM_TASKS": "8"}, "SLURM_STEP_NUM_TASKS=8: srun started"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "1"}, "SLURM_PROCID=1: srun started"),
    ],
)
def test_an_environment_that_fits_no_launcher_is_explained(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], told: str
) -> None:
    with pytest.raises(ConfigError) as error:
        launched(monkeypatch, environment)
    assert told in str(error.value)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.xdist_group("ranks")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes_is_told_of(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    said = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"rank {rank} of 2 did not meet the others at 127.0.0.1") as error:
        start("cpu", timeout_s=1)
    assert len(str(error.value).splitlines()) == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_meeting_place_without_an_address_is_told_of(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", **MEETING, "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"at nowhere:29500 .*Name or service not known"):
        start("cpu", timeout_s=0.1)


@pytest.mark.xdist_group("ranks")
def test_ranks_that_lost_each_other_meet_again() -> None:
    """One leaves in the middle, as in a sweep in which a run fails on one rank."""

    def work() -> None:
        rank = int(os.environ["RANK"])
        world = start("cpu", timeout_s=30)
        if rank == 0:
            with pytest.raises(RuntimeError):
                world.barrier()
        stop()
        world = start("cpu", timeout_s=30)
        assert world.each(rank) == [0, 1]
        stop()

    assert as_ranks(2, work) == 0
