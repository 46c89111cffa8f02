"""How an encoder of transformers is asked: question and document in one input, put together by its own tokenizer.

S inputs, N tokens of the longest.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...models.folder import read_config
from ..data.encoder_process import plain
from ..data.teacher import reach
from ..errors import InputError
from .examples import Example
from .task import Task

NOTE = "conceptron_task"  # the field of config.json in which a fine-tuned encoder says what it has learned


class Note(NamedTuple):
    """What a fine-tuned encoder says of its head."""

    name: str  # of the task
    max_tokens: int  # of an input, in training
    label_offset: float = 0.0  # of values: the head predicts (value - offset) / scale
    label_scale: float = 1.0


def read_note(folder: Path) -> Note | None:
    """
    Raises:
        InputError: there is one, and it is not as it is written here.
    """
    fields = read_config(folder).get(NOTE)
    if fields is None:
        return None
    kinds = {"name": str, "max_tokens": int, "label_offset": float | int, "label_scale": float | int}
    if (
        not isinstance(fields, dict) or set(fields) != set(kinds)
        or any(not isinstance(fields[name], kind) or isinstance(fields[name], bool) for name, kind in kinds.items())
        or fields["max_tokens"] < 1
    ):  # fmt: skip
        raise InputError(f"{folder}/config.json: {NOTE}: expected {', '.join(kinds)}; export the model again")
    return Note(**fields)


class Input(NamedTuple):
    """One input, special tokens and all."""

    ids: np.ndarray  # int64
    types: np.ndarray  # int64: which text a token belongs to, as the tokenizer counts
    seen: int  # tokens of the document that are in it, of
    given: int
    is_cut: bool  # something of either text is not in it


class Padded(NamedTuple):
    input_ids: Tensor  # [S, N] int64
    attention_mask: Tensor  # [S, N] int64
    token_type_ids: Tensor | None  # [S, N] int64; None: the model knows none

    def to(self, device: torch.device, non_blocking: bool = False) -> "Padded":
        return Padded(*(None if part is None else part.to(device, non_blocking=non_blocking) for part in self))


class Template:
    """What a tokenizer puts before, between and behind texts."""

    def __init__(self, tokenizer: Any, *texts: str) -> None:
        found = tokenizer(*texts, truncation=False, padding=False, verbose=False).encodings[0]
        owners, edges = found.sequence_ids, [0]
        for number in range(len(texts)):
            mine = [i for i, owner in enumerate(owners) if owner == number]
            edges += [mine[0], mine[-1] + 1]
        edges.append(len(owners))
        self.own = [(np.array(found.ids[a:b], dtype=np.int64), np.array(found.type_ids[a:b], dtype=np.int64))
                    for a, b in zip(edges[::2], edges[1::2], strict=True)]  # fmt: skip
        self.types = [found.type_ids[i] for i in edges[1:-1:2]]
        self.num_tokens = sum(len(ids) for ids, _ in self.own)

    def fill(self, *texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(ids, types)"""
        ids, types = [self.own[0][0]], [self.own[0][1]]
        for text, kind, (after, after_types) in zip(texts, self.types, self.own[1:], strict=True):
            ids += [text, after]
            types += [np.full(len(text), kind, dtype=np.int64), after_types]
        return np.concatenate(ids), np.concatenate(types)


class Joint:
    """Reads the examples of a task as inputs of an encoder.

    What is too long loses the end of the document, and of the question only what no document leaves room for; of a
    pair of texts the longer one is cut first. A task that has one text of an example shows it once.
    """

    def __init__(self, tokenizer: Any, model: nn.Module, task: Task, max_tokens: int, where: str) -> None:
        """
        Args:
            model: the encoder, or one on the meta device.
            max_tokens: of an input, where the encoder could read more.
            where: the beginning of an error.

        Raises:
            InputError: the tokenizer is of another model, or nothing fits beside its special tokens.
        """
        config = model.config
        largest, num_rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
        if largest >= num_rows:
            raise InputError(
                f"{where}: its tokenizer is of another model: its largest id is {largest}, and there are embeddings of "
                f"{num_rows} tokens; get the model again"
            )
        self.is_pair, self.plain = task.form == "pair", plain(tokenizer.backend_tokenizer.to_str())
        self.is_single = self.is_pair and task.columns.get("first") == task.columns.get("second", "")
        self.one, self.two = Template(tokenizer, "a"), Template(tokenizer, "a", "a")
        self.limit = min(reach(model), tokenizer.model_max_length, max_tokens)
        if self.limit < self.two.num_tokens + 2:
            raise InputError(f"{where}: reads {self.limit} tokens, {self.two.num_tokens} of which are special ones; no "
                             "question and no document fit")  # fmt: skip
        own = [getattr(config, "pad_token_id", None), tokenizer.pad_token_id, 0]
        self.pad_id = next(number for number in own if number is not None)  # positions may be counted by the model's
        self.pads_left = tokenizer.padding_side == "left"
        self.has_types = "token_type_ids" in tokenizer.model_input_names and getattr(config, "type_vocab_size", 0) > 1

    def encode(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Each text once, without special tokens."""
        unique = list(dict.fromkeys(texts))
        found = self.plain.encode_batch_fast(unique, add_special_tokens=False)
        return {text: np.array(each.ids, dtype=np.int64) for text, each in zip(unique, found, strict=True)}

    def read(self, given: Sequence[Example]) -> list[list[Input]]:
        """The input of each example, or one for each of its options, which stand behind the question."""
        asked = [[f"{each.question} {option}" for option in each.options] or [each.question] for each in given]
        ids = self.encode([*(each.document for each in given), *(text for texts in asked for text in texts)])
        return [[self.together(ids[text], ids[each.document]) for text in texts]
                for each, texts in zip(given, asked, strict=True)]  # fmt: skip

    def together(self, question: np.ndarray, document: np.ndarray) -> Input:
        is_one = self.is_single or not len(question)
        template = self.one if is_one else self.two
        room = self.limit - template.num_tokens
        first = 0 if is_one else min(len(question), room)
        if not is_one and self.is_pair:
            first = min(len(question), max(room // 2, room - len(document)))
        seen = min(len(document), room - first)
        texts = [document[:seen]] if is_one else [question[:first], document[:seen]]
        is_cut = seen < len(document) or (not is_one and first < len(question))
        return Input(*template.fill(*texts), seen, len(document), is_cut)

    def pad(self, inputs: Sequence[Input]) -> Padded:
        """At least one row, since not every model reads none."""
        longest = max((len(each.ids) for each in inputs), default=1)
        ids = torch.full((max(1, len(inputs)), longest), self.pad_id)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        mask[len(inputs) :] = 1
        for row, each in enumerate(inputs):
            place = slice(longest - len(each.ids), longest) if self.pads_left else slice(len(each.ids))
            ids[row, place], types[row, place] = torch.from_numpy(each.ids), torch.from_numpy(each.types)
            mask[row, place] = 1
        return Padded(ids, mask, types if self.has_types else None)
