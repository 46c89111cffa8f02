"""Ranks that meet, ranks that never come, and ports that are somebody else's. A rank is a thread here."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import pytest

from conceptron.engine.errors import InputError, LaunchError
from conceptron.engine.launching import rendezvous
from conceptron.engine.launching.place import Place


@pytest.fixture
def port() -> int:
    with closing(socket.socket()) as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(rendezvous, "NOTICE_S", 0.3)
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.5)
    monkeypatch.setattr(rendezvous, "PAUSE_S", 0.05)
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)


@contextmanager
def somebody_else() -> Iterator[int]:
    """The port of a program that takes calls and never answers."""
    with closing(socket.socket()) as server:
        server.bind(("", 0))
        server.listen()
        yield server.getsockname()[1]


def meet(ranks: list[int], size: int, port: int, seconds: float = 20, **changes) -> list:
    """What each of these ranks of ``size`` gets: a store, or an error."""
    places = [Place(rank, 0, size, size, "127.0.0.1", port, False)._replace(**changes) for rank in ranks]
    with ThreadPoolExecutor(len(ranks)) as threads:
        calls = [threads.submit(rendezvous.meet, place, seconds / 60) for place in places]
        return [call.exception() or call.result() for call in calls]


def test_all_meet_and_share_a_store(port, capfd):
    stores = meet([2, 0, 1], 3, port)
    stores[0].set("said", "by rank 2")
    assert [store.get("said") for store in stores] == [b"by rank 2"] * 3
    assert capfd.readouterr() == ("", "")


def test_who_is_missing_is_said_and_after_a_while_all_give_up(port, capfd):
    errors = meet([0, 2], 4, port, seconds=1, by_slurm=True)
    expected = (
        "2 of 4 ranks have not come (ranks 1, 3): sbatch starts a script once, srun would start it 4 times; put srun "
        "before the command, or unset SLURM_PROCID to run alone"
    )
    assert [type(error) for error in errors] == [InputError] * 2  # one of them speaks for both
    assert {str(error) for error in errors} == {f"{expected}; gave up after 0.0166667 minutes (run.join_minutes)"}
    notice = f"conceptron: waiting: {expected}; giving up after 0.0166667 minutes (run.join_minutes)\n"
    assert capfd.readouterr() == ("", notice)


def test_many_missing_ranks_are_named_in_part(port):
    (error,) = meet([0], 100, port, seconds=0.5)
    assert str(error).startswith("99 of 100 ranks have not come (ranks 1, 2, 3, 4, 5, 6, 7, 8, ...): start them, or")


@pytest.mark.parametrize("host, reason", [("127.0.0.1", "Connection refused"), ("no.such.host.invalid", "")])
def test_a_rank_that_cannot_reach_the_first(host, reason, port, capfd):
    (error,) = meet([1], 2, port, seconds=1, host=host)
    assert isinstance(error, LaunchError)  # nobody else can say it
    assert str(error).startswith(f"rank 1 cannot reach rank 0 at {host}:{port} ({reason}")
    assert "see that it runs, and that MASTER_ADDR and MASTER_PORT are" in str(error)
    output = capfd.readouterr().err
    assert output.startswith("conceptron: waiting: rank 1 cannot reach rank 0") and output.count("\n") == 1


def test_a_port_that_is_taken():
    with somebody_else() as port:
        first, second = (meet([rank], 2, port, seconds=1)[0] for rank in (0, 1))
    taken = f"environment: MASTER_PORT: {port} is in use on this machine; set it to a free one for all ranks"
    assert isinstance(first, LaunchError) and str(first) == taken
    assert isinstance(second, LaunchError)
    assert str(second).startswith(f"rank 1: what answers at 127.0.0.1:{port} is not rank 0 (no answer); set MASTER_")


def test_the_first_may_come_last(port):
    with ThreadPoolExecutor(1) as threads:
        early = threads.submit(meet, [1], 2, port)
        (late,) = meet([0], 2, port)
    assert not isinstance(late, Exception) and not isinstance(early.result()[0], Exception)
