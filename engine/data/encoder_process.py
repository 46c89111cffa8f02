"""A process that turns texts into tokens: run as a script, with frames on its standard input and output.

It needs neither torch nor this package, so that it starts in a fraction of a second, and it ends when whoever started
it does. A frame is its length in eight bytes and a pickle: first the tokenizer as JSON, then lists of texts, each of
which is answered by what `encode` makes of it.
"""

import hashlib
import pickle
import sys
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from tokenizers import Tokenizer


class Encoded(NamedTuple):
    """The tokens of several texts, end to end, without those texts that have none."""

    ids: bytes  # of the type asked for
    lengths: list[int]  # tokens of each text
    hashes: list[int]  # of each text, 64 bits
    num_bytes: int  # of the texts, in UTF-8


def plain(description: str) -> Tokenizer:
    """A tokenizer that adds nothing, cuts nothing, and takes special tokens in a text for the letters they are."""
    tokenizer = Tokenizer.from_str(description)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], dtype: str) -> Encoded:
    arrays, lengths, hashes, num_bytes = [], [], [], 0
    for text, encoding in zip(texts, tokenizer.encode_batch_fast(texts, add_special_tokens=False), strict=True):
        ids = np.array(encoding.ids, dtype=dtype)
        if not len(ids):
            continue
        written = text.encode()
        arrays.append(ids.tobytes())
        lengths.append(len(ids))
        hashes.append(hash_of(written))
        num_bytes += len(written)
    return Encoded(b"".join(arrays), lengths, hashes, num_bytes)


def hash_of(text: bytes) -> int:
    """Of a text in UTF-8, 64 bits."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def send(stream: BinaryIO, value: Any) -> None:
    frame = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    stream.write(len(frame).to_bytes(8, "little"))
    stream.write(frame)
    stream.flush()


def receive(stream: BinaryIO) -> Any:
    """
    Raises:
        EOFError: the other side is gone.
    """
    head = stream.read(8)
    frame = stream.read(int.from_bytes(head, "little"))
    if len(head) < 8 or len(frame) < int.from_bytes(head, "little"):
        raise EOFError
    return pickle.loads(frame)


def main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    description, dtype = receive(source)
    tokenizer = plain(description)
    while True:
        try:
            send(sink, tuple(encode(tokenizer, receive(source), dtype)))
        except (EOFError, BrokenPipeError):
            return


if __name__ == "__main__":
    main()
