"""What a launcher told this process in its environment: which rank it is, and of how many. No torch."""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass

from deepvit_train.error import ConfigError

# torchrun sets these, and so does whoever starts ranks as torchrun does.
NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Launchers that start copies which do not know of each other: what they set, and the fewest that is too many.
OTHERS = {
    "OMPI_COMM_WORLD_SIZE": ("mpirun", 2),
    "MV2_COMM_WORLD_SIZE": ("mpirun", 2),
    "PMI_SIZE": ("mpiexec", 2),
    "SLURM_STEP_NUM_TASKS": ("srun", 2),
    "SLURM_PROCID": ("srun", 1),
}


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together, and where they meet."""

    rank: int
    size: int
    host: str = ""
    port: int = 0

    def wait_for_host(self, seconds: float) -> None:
        """Wait until the meeting place can be reached. Raises OSError if it can't in this time.

        torch would wait as well, but it tells of a failure in a page of C++ frames.
        """
        # The first rank opens the place itself, unless torchrun has done so.
        opens = self.rank == 0 and _said("TORCHELASTIC_USE_AGENT_STORE") != "True"
        end = time.monotonic() + seconds
        while True:
            try:
                if opens:
                    socket.getaddrinfo(self.host, self.port)
                else:
                    socket.create_connection((self.host, self.port), timeout=max(0.1, seconds)).close()
                return
            except OSError:
                if time.monotonic() >= end:
                    raise
            time.sleep(min(0.2, seconds))


def read_launch() -> Launch:
    """Read what torchrun told this process; without torchrun it is one process alone.

    Raises ConfigError for values that are no numbers or do not fit, and for copies started by a launcher that
    tells them nothing of each other: each of them would do the whole work.
    """
    rank, size = _number("RANK", 0), _number("WORLD_SIZE", 1, least=1)
    local_rank()
    if not _said("WORLD_SIZE"):
        _check_alone()
        return Launch(0, 1)
    if size > 1 and (missing := [name for name in NEEDED if not _said(name)]):
        raise ConfigError(
            f"WORLD_SIZE={size} is set, but {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not\n"
            "start it with torchrun, which sets all of them, or unset WORLD_SIZE"
        )
    if rank >= size:
        raise ConfigError(f"RANK={rank}: must be less than WORLD_SIZE={size}")
    return Launch(rank, size, _said("MASTER_ADDR"), _number("MASTER_PORT", 0, most=65535))


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU. Raises ConfigError."""
    return _number("LOCAL_RANK", 0)


def local_size() -> int:
    """Return how many processes were started on this machine. Raises ConfigError."""
    return _number("LOCAL_WORLD_SIZE", 1, least=1)


def _check_alone() -> None:
    for name in ("RANK", "LOCAL_RANK"):
        if _number(name, 0):
            raise ConfigError(
                f"{name}={_said(name)} is set, but WORLD_SIZE is not\n"
                f"start it with torchrun, which sets both, or unset {name}"
            )
    for name, (launcher, too_many) in OTHERS.items():
        said = _said(name)
        if said.isdecimal() and int(said) >= too_many:
            raise ConfigError(
                f"{name}={said}: {launcher} started several copies, and each would do the whole work\n"
                f"let {launcher} start torchrun, once on each machine (docs/cluster.md), or unset {name}"
            )


def _number(name: str, default: int, least: int = 0, most: int = 2**31 - 1) -> int:
    said = _said(name)
    if not said:
        return default
    if not (said.isascii() and said.isdecimal()) or not least <= int(said) <= most:
        raise ConfigError(
            f"{name}={said} in the environment: must be a whole number from {least} on; torchrun sets it"
        )
    return int(said)


def _said(name: str) -> str:
    """Return the value of a variable of the environment; an empty one counts as not set."""
    return os.environ.get(name, "").strip()
