"""Tokenizers: the byte-level BPE that is trained on pydocs, or any fast one from a folder or the hub."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ...models.objectives.view import SpecialTokens
from ..errors import InputError
from ..model_folder import find, has_tokenizer
from .encoder_process import plain

SPECIAL = {
    "pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]", "mask_token": "[MASK]",
}  # fmt: skip

FILES = ("*.json", "*.txt", "*.model")  # of a tokenizer on the hub
EXPECTED = "give a folder with tokenizer.json, a hub id, or pydocs"


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer and what the rest of the program needs of it."""

    tokenizer: PreTrainedTokenizerFast
    tokens: SpecialTokens
    fingerprint: str  # changes when the same text may get other ids
    plain: Tokenizer  # encodes text as it stands: adds nothing, cuts nothing, and "[MASK]" in a text is six characters

    def encode(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.plain.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_with_masks(self, text: str) -> list[int]:
        """The same, but that a mask token written in the text is the mask id, and takes the white space before it."""
        reader = Tokenizer.from_str(with_stripping_mask(self.tokenizer, special=False))
        reader.no_truncation()
        reader.no_padding()
        reader.encode_special_tokens = True  # of the others
        return reader.encode(text, add_special_tokens=False).ids


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text can be written in it and read back unchanged."""
    tokenizer = Tokenizer(models.BPE(unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def load(place: str, field: str = "data.tokenizer") -> PreTrainedTokenizerFast:
    """A tokenizer from a folder or the hub. ``field``: of the recipe or the command line, for the error.

    Raises:
        InputError: it cannot be loaded, or it is not a fast one.
    """
    folder = find(place, field, FILES, EXPECTED)
    if not has_tokenizer(folder):
        raise InputError(f"{field}: {place}: no tokenizer.json in this folder; {EXPECTED}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers, huggingface_hub and tokenizers have dozens of kinds
        text = " ".join(str(error).split())
        raise InputError(
            f"{field}: {place}: the tokenizer cannot be loaded ({type(error).__name__}: {text[:200]}); {EXPECTED}"
        ) from error
    if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
        kind = type(tokenizer).__name__
        raise InputError(f"{field}: {place}: {kind} is not a fast tokenizer; convert it to tokenizer.json")
    return tokenizer


def with_mask(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer of a causal model has no mask token; it gets one, behind its other entries."""
    if tokenizer.mask_token_id is None:
        tokenizer.add_special_tokens({"mask_token": SPECIAL["mask_token"]})
    return tokenizer


def describe(tokenizer: PreTrainedTokenizerFast, place: str, field: str = "data.tokenizer") -> Vocabulary:
    """Checks that a tokenizer can serve, and takes from it what is needed.

    Raises:
        InputError: it has no mask token.
    """
    if tokenizer.mask_token_id is None:
        raise InputError(
            f"{field}: {place}: no mask token; choose another tokenizer, or add one with "
            "tokenizer.add_special_tokens({'mask_token': '[MASK]'}) and save_pretrained"
        )
    text = tokenizer.backend_tokenizer.to_str()
    special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
    return Vocabulary(
        tokenizer=tokenizer,
        tokens=SpecialTokens(tokenizer.mask_token_id, frozenset(special), max(tokenizer.get_vocab().values()) + 1),
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
        plain=plain(text),
    )


def for_use(tokenizer: PreTrainedTokenizerFast, length: int) -> PreTrainedTokenizerFast:
    """The tokenizer that is exported with a model: a call gives what the model was trained on, and nothing else.

    One rule for every vocabulary. A text is its own tokens: nothing is put before or behind it, since training never
    showed [CLS], BOS or EOS there. A pair is the first text, one separator, the second; the separator is the
    tokenizer's own, else its end of text, else its [CLS] or beginning of text. White space before the mask token
    belongs to the hidden word, as ``conceptron generate`` has it. ``length``: of training, where
    ``truncation=True`` cuts.

    Padding, where a vocabulary has no token for it, is the separator: the attention mask says where it is.
    """
    state = json.loads(with_stripping_mask(tokenizer))
    names = ("sep_token", "eos_token", "cls_token", "bos_token")
    separator = next((getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None), None)
    pieces, special = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}], {}
    if separator is not None:
        pieces.insert(1, {"SpecialToken": {"id": separator, "type_id": 0}})
        ids = [tokenizer.convert_tokens_to_ids(separator)]
        special[separator] = {"id": separator, "ids": ids, "tokens": [separator]}
    template = {"type": "TemplateProcessing", "single": pieces[:1], "pair": pieces, "special_tokens": special}
    state |= {"post_processor": template, "truncation": None, "padding": None}
    tokens = {name: value for name, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    if separator is not None:
        tokens = {"sep_token": separator, "pad_token": separator} | tokens
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state, allow_nan=False)), model_max_length=length,
        padding_side="right", truncation_side=tokenizer.truncation_side, clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"], **tokens,
    )  # fmt: skip


def with_stripping_mask(tokenizer: PreTrainedTokenizerFast, special: bool = True) -> str:
    """The tokenizer's own description, but that its mask token takes the space before it."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for entry in state["added_tokens"]:
        if entry["content"] == tokenizer.mask_token:
            entry.update(lstrip=True, special=special)
    return json.dumps(state, allow_nan=False)


def save(tokenizer: PreTrainedTokenizerFast, folder: Path) -> dict[str, Any]:
    tokenizer.save_pretrained(folder)
    return {"vocab_size": len(tokenizer)}
