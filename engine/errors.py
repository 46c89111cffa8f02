"""The one error a user of the command line is meant to see."""


class InputError(ValueError):
    """Bad input: a recipe, a data folder or a run folder that cannot be used as given.

    The message is one line that says what is wrong, where, what came and what to do about it. The command line prints
    it and exits with code 2, without a traceback; everything else that is raised is a fault of the program.
    """

    of_all = False  # whether every rank has met it together, so that rank 0 says it and no other


class Interrupted(InputError):
    """What may come right by itself, such as a network that is down: what was done so far is kept, to go on from."""


class LaunchError(InputError):
    """What one rank meets and others may not: its place among them. Each rank that meets one says it."""
