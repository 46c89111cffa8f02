"""Where words begin, read off the entries of a tokenizer."""

import json
import re
import unicodedata
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from ...models.objectives.view import ENDS_WORD, OPENS_WORD

CLOSING = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def word_edges(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> bytes | None:
    """One byte for each id, ``OPENS_WORD | ENDS_WORD``, see ``SpecialTokens``; None if the entries do not tell.

    They tell in byte-level BPE (GPT-2, ModernBERT), WordPiece (BERT) and SentencePiece-like vocabularies: a word is a
    run of letters and digits with the space before it; everything else is a word by itself. An entry that holds a part
    of a character counts as a letter.
    """
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    spell = spelling(state)
    if spell is None:
        return None
    added = tokenizer.added_tokens_decoder  # these stand in the vocabulary as they are in the text
    edges = np.full(vocab_size, OPENS_WORD | ENDS_WORD, dtype=np.uint8)
    for entry, i in tokenizer.get_vocab().items():
        text = added[i].content if i in added else spell(entry)
        if text:
            edges[i] = OPENS_WORD * (not in_word(text[0])) | ENDS_WORD * (not in_word(text[-1]))
    return edges.tobytes()


def sentence_ends(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> np.ndarray:
    """[V] bool: entries that end with a full stop, a question or an exclamation mark, or hold the end of a line.

    An abbreviation or a decimal point counts as well: where a sentence has to be right, this is too simple.
    """
    closes = np.zeros(vocab_size, dtype=bool)
    for i in range(min(vocab_size, len(tokenizer))):
        text = tokenizer.backend_tokenizer.decode([i], skip_special_tokens=True)
        closes[i] = text.rstrip().endswith(CLOSING) or "\n" in text
    return closes


def spelling(state: dict[str, Any]) -> Any:
    """A function from an entry of the vocabulary to the text it stands for, with a space where a word begins."""
    kinds = {part["type"] for part in parts(state.get("decoder"))}
    if state["model"]["type"] == "WordPiece":
        prefix = state["model"]["continuing_subword_prefix"]
        return lambda entry: entry.removeprefix(prefix) if entry.startswith(prefix) else " " + entry
    if "ByteLevel" in kinds:
        value = {character: byte for byte, character in byte_characters().items()}
        return lambda entry: bytes(value[c] for c in entry).decode(errors="replace")
    if "Metaspace" in kinds or '"▁"' in json.dumps(state.get("decoder"), ensure_ascii=False, allow_nan=False):
        return lambda entry: BYTE.sub(lambda byte: chr(int(byte[1], 16)), entry).replace("▁", " ")
    return None


def parts(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return [decoder, *(inner for part in decoder.get("decoders", []) for inner in parts(part))]


def byte_characters() -> dict[int, str]:
    """The character that byte-level BPE writes for each byte: itself if it can be printed, else one from U+0100 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def in_word(character: str) -> bool:
    return character.isalnum() or character == "\ufffd" or unicodedata.category(character).startswith("M")
