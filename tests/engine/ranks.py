"""Runs `train` on several ranks, without a port: one process imports everything, then forks the ranks of each job.

    python ranks.py JOBS.json    JOBS: [{"world": 2, "recipe": PATH, "overrides": [...], "fault": [KIND, RANK, STEP],
                                         "again": [RUN, COPY, STEP]}]

The exit codes of all ranks are printed as JSON, one line a job. `again` copies a finished run's folder before the job
begins, as it was after STEP. `fault` makes one rank send itself SIGTERM ("stop") or
meet a weight that is not a number ("poison"), once, at a step counted from 1.
"""

import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from dataclasses import replace

import torch
import torch.distributed as dist

from conceptron.engine import trainer
from conceptron.engine.data.loader import Loader
from conceptron.engine.telemetry import Telemetry

# imported before the ranks are forked, and so once; a run needs them all
SHARED = ("deepspeed", "torch.utils.tensorboard", "torch._inductor.compile_fx", "networkx")


def stop(at_step: int) -> None:
    report = Telemetry.step

    def step(self, number, *rest):
        report(self, number, *rest)
        if number == at_step:
            os.kill(os.getpid(), signal.SIGTERM)

    Telemetry.step = step


def poison(at_step: int) -> None:
    make = Loader.step

    def step(self, number):
        views = make(self, number)
        if number + 1 == at_step:
            views[0] = replace(views[0], weights=views[0].weights * float("nan"))
        return views

    Loader.step = step


def again(run: str, to: str, step: int) -> None:
    shutil.copytree(run, to)
    shutil.rmtree(f"{to}/model")
    for checkpoint in os.listdir(f"{to}/checkpoints"):
        if checkpoint > f"step-{step:08d}":
            shutil.rmtree(f"{to}/checkpoints/{checkpoint}")


def rank_of(job: dict, rank: int, store: str) -> None:
    """Never returns."""
    code = 1
    try:
        os.environ["LOCAL_RANK"] = str(rank)
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(store, job["world"]), rank=rank, world_size=job["world"])
        kind, where, when = job.get("fault", ("", -1, 0))
        if rank == where:
            {"stop": stop, "poison": poison}[kind](when)
        trainer.train(job["recipe"], job["overrides"])
        code = 0
    except SystemExit as stopped:
        code = stopped.code
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
