"""Where this process stands among others, as a launcher says it in the environment. Needs nothing but Python.

`deepspeed` and torchrun set RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT; srun says the same in words of its own.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from ..errors import LaunchError

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MOST = 2**20  # ranks


class Place(NamedTuple):
    rank: int
    local_rank: int
    size: int
    local_size: int  # processes on this machine, as far as the launcher says
    host: str  # where rank 0 is found
    port: int
    by_slurm: bool

    def variables(self) -> dict[str, str]:
        """Under the names that torch and DeepSpeed read."""
        values = (self.rank, self.local_rank, self.size, self.host, self.port)
        return dict(zip(VARIABLES, map(str, values), strict=True))


def find_place(environment: Mapping[str, str]) -> Place | None:
    """None: this process is alone.

    Raises:
        LaunchError: a variable is missing, or holds what it cannot.
    """
    if "RANK" in environment:
        missing = [name for name in VARIABLES if name not in environment and name != "LOCAL_RANK"]
        if missing:
            names = ", ".join(missing)
            raise LaunchError(f"environment: RANK is set but {names} is not; use torchrun, deepspeed or srun")
        return _place(environment, by_slurm=False)
    if "SLURM_PROCID" not in environment:
        return None
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in environment else "SLURM_NTASKS"
    if tasks not in environment or number(environment, tasks, 1, MOST) < 2:
        return None  # a shell, or a script, inside an allocation
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_JOB_NODELIST", "localhost"))
    job = number({"SLURM_JOB_ID": "0", **environment}, "SLURM_JOB_ID", 0, 2**32)
    named = {
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": str(20000 + job % 20000),  # the same on every task, another for another job
        **environment,
    }
    return _place(named, by_slurm=True, rank="SLURM_PROCID", local_rank="SLURM_LOCALID", size=tasks)


def _place(
    environment: Mapping[str, str], by_slurm: bool, rank: str = "RANK", local_rank: str = "LOCAL_RANK",
    size: str = "WORLD_SIZE",
) -> Place:  # fmt: skip
    num_ranks = number(environment, size, 1, MOST)
    num_local = number({"LOCAL_WORLD_SIZE": str(num_ranks), **environment}, "LOCAL_WORLD_SIZE", 1, num_ranks)
    host = environment["MASTER_ADDR"]
    if not host.strip() or len(host.split()) > 1 or not host.isprintable():
        raise LaunchError(f"environment: MASTER_ADDR: expected a host, got {host!r}")
    return Place(
        rank=number(environment, rank, 0, num_ranks - 1, f", below {size} = {num_ranks}"),
        local_rank=number({local_rank: "0", **environment}, local_rank, 0, num_local - 1),
        size=num_ranks, local_size=num_local, host=host,
        port=number(environment, "MASTER_PORT", 1, 65535), by_slurm=by_slurm,
    )  # fmt: skip


def number(environment: Mapping[str, str], name: str, least: int, most: int, why: str = "") -> int:
    """The whole number that a variable holds."""
    text = environment[name].strip()
    if not re.fullmatch(r"[0-9]{1,18}", text) or not least <= int(text) <= most:
        expected = f"a whole number from {least} to {most}{why}"
        raise LaunchError(f"environment: {name}: expected {expected}, got {environment[name]!r}")
    return int(text)


def is_first(environment: Mapping[str, str], on_its_machine: bool = False) -> bool:
    """Whether this process speaks for the others: rank 0, or who knows of no rank.

    ``on_its_machine``: also who speaks for a machine of its own, about what only that machine may lack.
    """
    names = ("RANK", "LOCAL_RANK") if "RANK" in environment else ("SLURM_PROCID", "SLURM_LOCALID")
    ranks = [environment.get(name, "0") for name in (names if on_its_machine else names[:1])]
    return any(re.fullmatch(r"\s*0*[1-9][0-9]*\s*", rank) is None for rank in ranks)


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list: `gpu[03-07,9],login1` -> `gpu03`."""
    match = re.match(r"([^\[,]+)(?:\[(\w+))?", nodes)
    return "".join(part for part in match.groups() if part) if match else nodes
