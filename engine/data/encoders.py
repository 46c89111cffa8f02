"""Texts to tokens by several processes at once, in the order of the texts."""

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from queue import SimpleQueue

from tokenizers import Tokenizer

from ..errors import Interrupted
from . import encoder_process
from .encoder_process import Encoded, encode, receive, send

BATCH_CHARS = 1 << 20  # of text that a process turns into tokens at once
AHEAD = 3  # batches for each process that have been read and not been written yet: bounds the memory


def encoded(
    documents: Iterable[str], tokenizer: Tokenizer, dtype: str, num_processes: int | None = None
) -> Iterator[tuple[int, Encoded]]:
    """(how many documents, their tokens) of one batch of documents after the other.

    What comes out does not depend on the number of processes. Text of one batch is not worth one.

    Args:
        tokenizer: one of `encoder_process.plain`.
        dtype: of the token ids.
        num_processes: None: one for each core that this process may use.

    Raises:
        Interrupted: one of the processes was ended.
    """
    queue = batches(documents)
    first = list(islice(queue, 2))
    if num_processes is None:
        num_processes = len(os.sched_getaffinity(0))
    if len(first) < 2 or num_processes == 1:
        for texts in chain(first, queue):
            yield len(texts), encode(tokenizer, texts, dtype)
        return
    with Encoders(tokenizer, dtype, num_processes) as encoders:
        waiting: list[tuple[int, Future[Encoded]]] = []
        for texts in chain(first, queue):
            waiting.append((len(texts), encoders.submit(texts)))
            if len(waiting) >= AHEAD * num_processes:
                count, found = waiting.pop(0)
                yield count, found.result()
        for count, found in waiting:
            yield count, found.result()


class Encoders:
    """Processes that turn texts into tokens, each with a thread here that talks to it. Close it, or use ``with``.

    They are processes of their own, not forked: the one that starts them may hold a GPU, threads and locks. When it
    dies, however it dies, their input ends and they end with it.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: str, num_processes: int) -> None:
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}  # one core each
        command = [sys.executable, "-P", str(Path(encoder_process.__file__))]
        options = {"env": environment, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        # in a session of their own: a Ctrl-C is for the one that started them
        self._processes = [subprocess.Popen(command, start_new_session=True, **options) for _ in range(num_processes)]
        self._idle: SimpleQueue[subprocess.Popen[bytes]] = SimpleQueue()
        for process in self._processes:
            send(process.stdin, (tokenizer.to_str(), dtype))
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(num_processes, thread_name_prefix="encoder")

    def submit(self, texts: list[str]) -> "Future[Encoded]":
        return self._threads.submit(self._ask, texts)

    def _ask(self, texts: list[str]) -> Encoded:
        process = self._idle.get()
        try:
            send(process.stdin, texts)
            return Encoded(*receive(process.stdout))
        except (EOFError, BrokenPipeError) as error:
            raise Interrupted(
                f"data.processes: one that turns text into tokens ended with {process.wait()}, perhaps for lack of "
                "memory; lower data.processes and start again, it goes on where it was"
            ) from error
        finally:
            self._idle.put(process)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown(wait=True)
        for process in self._processes:
            for pipe in (process.stdin, process.stdout):
                with suppress(BrokenPipeError):
                    pipe.close()
            process.wait()

    def __enter__(self) -> "Encoders":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    texts: list[str] = []
    chars = 0
    for text in documents:
        texts.append(text)
        chars += len(text)
        if chars >= BATCH_CHARS:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts
