"""Back to the weights before a stretch of outliers, and on with what comes after them."""

import gc
from typing import Any

from ..checkpoints import checkpoint
from ..errors import InputError

MAX_REWINDS = 3  # to the same checkpoint


def rewind(trainer: Any, first: int) -> bool:
    """Gives a `Trainer` the weights and moments of the last checkpoint before step ``first``, an outlier.

    Its steps go on counting: batches and learning rates are functions of the step, so those since that checkpoint are
    passed over. A run that is interrupted before its next checkpoint comes to the same decision again. Collective.

    Returns False, and changes nothing, where there is no such checkpoint.

    Raises:
        InputError: this has been tried too often, or no checkpoint can be trusted.
    """
    step, say = trainer.progress.step, trainer.telemetry.say
    trainer.tend(trainer.writer.finish)
    found, warnings = checkpoint.find(trainer.world, trainer.run.checkpoints, before=first)
    while found and (spikes := checkpoint.load_progress(found).spikes).get("in_a_row"):  # of a stretch itself
        found, warnings = checkpoint.find(trainer.world, trainer.run.checkpoints, before=spikes["first"])
    for warning in warnings:
        say(f"warning: {warning}")
    if found is None:
        say(f"step {step}: there is no checkpoint from before step {first} to go back to")
        return False
    if trainer.rewound.count(found) == MAX_REWINDS:
        raise InputError(
            f"{trainer.run.path}: stopped at step {step}, after {MAX_REWINDS} times back to {found.name} the loss "
            "rises again; lower optim.lr, and start another run.name"
        )
    trainer.rewound.append(found)
    then = checkpoint.load_progress(found)
    trainer.progress.optimizer_steps = then.optimizer_steps
    trainer.spikes.load(then.spikes)
    trainer.engine.destroy()  # its memory is needed for the next
    trainer.engine = None
    gc.collect()
    trainer.engine = trainer.open(found)
    trainer.telemetry.record("rewind", step, to=then.step, first=first)
    say(f"step {step}: back to the weights of {found.name}; batches up to here are passed over")
    return True
