"""Trains one run to its end through everything that can befall it, and says what happened.

    python chaos.py RECIPE RUN SEED SECONDS [OVERRIDE ...]

One process imports everything, then forks every attempt. An attempt is killed or terminated after a random number of
steps, dies between two lines of the writing of a checkpoint, or meets a full disk; between attempts a file of the
newest checkpoint is cut short, removed, or has one bit flipped, as long as an older one is whole. When SECONDS are
over, or nothing is left to happen, it is left alone. The last line is JSON: how often what happened.
"""

import collections
import errno
import importlib
import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
from ranks import SHARED, after_step

from conceptron.engine import trainer
from conceptron.engine.checkpoints import checkpoint

FIRST = ("kill", "stop", "torn", "full")  # each at least once
THEN = ("kill", "torn", "full", "torn", "kill", "torn", "stop", "full")
DAMAGES = ("flip", "flip", "cut", "remove", "record")


def tear(when: random.Random) -> None:
    """Death at one of the steps of a save, each of which is a call of the module `checkpoint`."""
    name = when.choice(("begin", "write_state", "_write_json", "_sync", "publish"))
    function, left = getattr(checkpoint, name), when.randint(1, 4)

    def fatal(*arguments):
        nonlocal left
        left -= 1
        if left == 0 and when.random() < 0.5:  # before it is done, or after
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(checkpoint, name, fatal)


def fill(when: random.Random) -> None:
    """A disk that is full for a while: half a file, then an error."""
    function, bad = checkpoint.write_state, {when.randint(1, 3) for _ in range(2)}
    count = 0

    def full(tensors, file):
        nonlocal count
        count += 1
        if count in bad:
            file.write_bytes(b"half a file")
            raise OSError(errno.ENOSPC, "No space left on device")
        return function(tensors, file)

    checkpoint.write_state = full


def end_after(num_steps: int, signum: int) -> None:
    def count() -> None:
        nonlocal num_steps
        num_steps -= 1
        if num_steps == 0:
            os.kill(os.getpid(), signum)

    after_step(None, count)


def attempt(event: str, seed: int, recipe: str, overrides: list[str]) -> None:
    """One process that trains; never returns."""
    when, code = random.Random(seed), 1
    try:
        if event == "torn":
            tear(when)
        elif event:
            end_after(when.randint(1, 6), signal.SIGTERM if event == "stop" else signal.SIGKILL)
        if event == "full":
            fill(when)
        trainer.train(recipe, overrides)
        code = 0
    except SystemExit as stopped:
        code = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def damage(run: Path, chance: random.Random) -> str:
    """Something befalls the newest checkpoint, if another one is whole, or the record of the run."""
    kept = checkpoint.list_checkpoints(run / "checkpoints")
    if len(kept) < 2 or any(checkpoint.verify(each) for each in kept[1:2]):
        return ""
    file = chance.choice(sorted(path for path in kept[0].iterdir() if path.is_file()))
    what = chance.choice(DAMAGES)
    content = bytearray(file.read_bytes())
    if what == "record":
        (run / "metrics.jsonl").open("a").write('{"kind": "tr')
    elif what == "remove":
        file.unlink()
    elif what == "cut":
        file.write_bytes(content[: chance.randrange(len(content))])
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
    return what


def main(recipe: str, run: str, seed: str, seconds: str, *overrides: str) -> None:
    torch.set_num_threads(1)
    for name in SHARED:
        importlib.import_module(name)
    chance, until = random.Random(int(seed)), time.monotonic() + float(seconds)
    events = [*chance.sample(THEN, len(THEN)), *chance.sample(FIRST, len(FIRST))]  # the last one is the first
    happened: collections.Counter[str] = collections.Counter()
    while True:
        event = events.pop() if events and time.monotonic() < until else ""
        child = os.fork()
        if child == 0:
            attempt(event, chance.randrange(2**32), recipe, [*overrides, "resume=auto"])
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        happened[f"{event or 'left alone'} {code}"] += 1
        if code == 0:
            break
        if code in (1, 2):
            sys.exit(f"{event or 'left alone'}: failed by itself")
        if chance.random() < 0.6:
            happened[damage(Path(run), chance)] += 1
    print(json.dumps(happened))


if __name__ == "__main__":
    main(*sys.argv[1:])
