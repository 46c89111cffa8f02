"""Runs `train` on several ranks, without a port: one process imports everything, then forks the ranks of each job.

    python ranks.py JOBS.json    JOBS: [{"world": 2, "recipe": PATH, "overrides": [...], "fault": [KIND, RANK, STEP],
                                         "again": [RUN, COPY, STEP], "backend": NAME}]

The exit codes of all ranks are printed as JSON, one line a job. `again` copies a finished run's folder before the job
begins, as it was after STEP; `backend` is that of torch.compile. `fault` makes one rank send itself a signal ("stop":
SIGTERM, "freeze": SIGSTOP, "kill": SIGKILL), sleep without end ("sleep"), or meet weights that are not a number
("poison") or a thousand times too large ("spike"), once, at a step counted from 1. With a "port" ranks meet there, as
launchers let them, and not in a file; "errors" is a file for what they say; "memory_mb" is how much more they may have.
"""

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from conceptron.engine import compiled, trainer
from conceptron.engine.data.loader import Loader
from conceptron.engine.errors import InputError
from conceptron.engine.failures import watch
from conceptron.engine.telemetry import Telemetry

# imported before the ranks are forked, and so once; a run needs them all
SHARED = ("deepspeed", "torch.utils.tensorboard", "torch._inductor.compile_fx", "networkx")


def after_step(at_step: int | None, action: Callable[[], None]) -> None:
    """None: after every one."""
    report = Telemetry.step

    def step(self, number, *rest):
        report(self, number, *rest)
        if at_step in (None, number):
            action()

    Telemetry.step = step


def scale(at_step: int, factor: float) -> None:
    """The weights of what a step asks for."""
    make = Loader.step

    def step(self, number):
        views = make(self, number)
        if number + 1 == at_step:
            views[0] = replace(views[0], weights=views[0].weights * factor)
        return views

    Loader.step = step


def again(run: str, to: str, step: int) -> None:
    shutil.copytree(run, to)
    shutil.rmtree(f"{to}/model")
    for checkpoint in os.listdir(f"{to}/checkpoints"):
        if checkpoint > f"step-{step:08d}":
            shutil.rmtree(f"{to}/checkpoints/{checkpoint}")


SIGNALS = {"stop": signal.SIGTERM, "freeze": signal.SIGSTOP, "kill": signal.SIGKILL}
FACTORS = {"poison": float("nan"), "spike": 1000.0}


def arrange(kind: str, at_step: int) -> None:
    if kind in FACTORS:
        scale(at_step, FACTORS[kind])
    elif kind == "sleep":
        after_step(at_step, lambda: time.sleep(1000))
    else:
        after_step(at_step, lambda: os.kill(os.getpid(), SIGNALS[kind]))


def rank_of(job: dict, rank: int, store: str) -> None:
    """Never returns."""
    code = 1
    if "errors" in job:
        os.dup2(os.open(job["errors"], os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    try:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.set_num_threads(1)
        if "memory_mb" in job:
            mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (mapped + (job["memory_mb"] << 20),) * 2)
        size, port = job["world"], job.get("port")
        if port is None:
            dist.init_process_group("gloo", store=dist.FileStore(store, size), rank=rank, world_size=size)
        else:
            place = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
        compiled.BACKEND = job.get("backend", compiled.BACKEND)
        kind, where, when = job.get("fault", ("", -1, 0))
        watch.NO_STORE_S = 3.0
        if rank == where:
            arrange(kind, when)
        trainer.train(job["recipe"], job["overrides"])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except InputError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def main(path: str) -> None:
    for name in SHARED:
        importlib.import_module(name)
    with open(path) as file:
        jobs = json.load(file)
    for job in jobs:
        if "again" in job:
            again(*job["again"])
        with tempfile.TemporaryDirectory() as folder:
            children = []
            for rank in range(job["world"]):
                child = os.fork()
                if child == 0:
                    rank_of(job, rank, f"{folder}/store")
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps(codes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
