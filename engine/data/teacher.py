"""A sentence encoder whose vectors others learn from: any encoder of transformers, in a folder or on the hub."""

import hashlib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from ...models.backbone_source import check_loaded
from ...models.folder import read_json as read_strictly
from ..errors import InputError
from ..model_folder import find, has_tokenizer, in_one_line, inspect
from ..precision import reads_mixed
from ..saved_model import quiet
from .tokenizer import load as load_tokenizer

POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
BATCH_TOKENS = 8192  # padding included
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


class Teacher:
    """Vectors of texts, of norm 1. Without files of sentence-transformers, tokens are averaged.

    A text that is longer than the teacher reads at once is cut into equal pieces; its vector is then that of their
    pooled states' mean, weighted by their lengths.
    """

    def __init__(self, place: str, device: torch.device | str = "cpu") -> None:
        """
        Args:
            place: a folder, or a hub id.
            device: where it has units for bfloat16, matrices are multiplied in it, unless they are narrow; this moves a
                cosine in its fourth decimal. ``is_mixed = False`` gives float32.

        Raises:
            InputError: it cannot be read, or pools in a way that is not known here.
        """
        self.name, self.device = place, torch.device(device)
        folder, field = find(place, "distill.teacher"), f"distill.teacher: {place}"
        inspect(folder, "distill.teacher")
        with in_one_line(place, "distill.teacher"):
            self.pooling, limit = read_pooling(folder)
        if not has_tokenizer(folder):
            raise InputError(f"{field}: no tokenizer.json; a teacher reads text in its own tokens")
        self.tokenizer = load_tokenizer(str(folder), "distill.teacher")
        with in_one_line(place, "distill.teacher"), quiet():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
            model, info = AutoModel.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )
            check_loaded(folder, model, info)
        largest, num_rows = max(self.tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
        if largest >= num_rows:
            raise InputError(
                f"{field}: its tokenizer is of another model: its largest id is {largest}, and there are embeddings of "
                f"{num_rows} tokens; get the model again"
            )
        self.model = model.to(self.device).eval()
        self.width = config.hidden_size
        self.is_mixed = reads_mixed(self.width, self.device.type)
        own = self.tokenizer("").input_ids
        self.opening, self.closing = (own[:1], own[1:]) if len(own) > 1 else ([], own)
        longest = reach(model)
        self.max_tokens = min(limit or longest, longest) - len(own)
        self.fingerprint = fingerprint_of(folder)
        is_here = Path(place).expanduser().exists()
        name = folder.resolve().name if is_here else place  # a path of this machine is no name
        self.record = {"teacher": name, "architecture": config.model_type, "width": self.width,
                       "pooling": self.pooling, "fingerprint": self.fingerprint}  # fmt: skip

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """[n, e] float32 of norm 1; 0 for a text without a token."""
        ids = self.tokenizer(
            list(texts), add_special_tokens=False, truncation=False, padding=False, verbose=False
        ).input_ids  # fmt: skip
        owner, pieces = [], []
        for number, words in enumerate(ids):
            count = -(-len(words) // self.max_tokens)
            edges = [i * len(words) // count for i in range(count + 1)] if count else []
            for begin, end in pairwise(edges):
                owner.append(number)
                pieces.append([*self.opening, *words[begin:end], *self.closing])
        sums = np.zeros((len(texts), self.width), dtype=np.float64)
        order = sorted(range(len(pieces)), key=lambda i: len(pieces[i]))
        while order:
            longest, taken = len(pieces[order[-1]]), []
            while order and longest * (len(taken) + 1) <= max(BATCH_TOKENS, longest):
                taken.append(order.pop())
            pooled = self.pool([pieces[i] for i in taken]).double().cpu().numpy()
            for i, vector in zip(taken, pooled, strict=True):
                sums[owner[i]] += len(pieces[i]) * vector
        norms = np.linalg.norm(sums, axis=1, keepdims=True)
        return (sums / np.where(norms > 0, norms, 1)).astype(np.float32)

    def pool(self, pieces: list[list[int]]) -> Tensor:
        """[n, e] before it is normalised."""
        lengths = torch.tensor([len(piece) for piece in pieces])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.full(mask.shape, self.tokenizer.pad_token_id or 0)
        ids[mask] = torch.tensor([i for piece in pieces for i in piece])
        ids, mask = ids.to(self.device), mask.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_mixed):
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        if self.pooling == "cls":
            return states[:, 0]
        return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def reach(model: nn.Module) -> int:
    """Tokens of the longest input of a model of transformers, special ones among them; 512 where it sets no limit.

    A family whose positions are counted from behind its padding token's (RoBERTa, MPNet) has fewer than rows of them.
    """
    rows = getattr(model.config, "max_position_embeddings", None) or 512
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            rows = min(rows, module.num_embeddings - first)
    return rows


def read_pooling(folder: Path) -> tuple[str, int | None]:
    """How a folder of sentence-transformers pools, and the longest input it is meant for; ("mean", None) of another.

    Raises:
        InputError: a step is not known here.
    """
    modules = read_json(folder / "modules.json")
    if modules is None:
        return "mean", None
    kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
    unknown = [kind for kind in kinds if kind not in KNOWN_MODULES]
    if unknown or "Pooling" not in kinds:
        found = ", ".join(kinds)
        expected = "Transformer, Pooling and Normalize in modules.json"
        raise InputError(f"distill.teacher: {folder}: expected {expected}, got {found}")
    options: dict[str, Any] = read_json(folder / kinds["Pooling"] / "config.json") or {}
    named = options.get("pooling_mode")
    chosen = [named] if named else [name for key, name in POOLINGS.items() if options.get(key)]
    others = [key for key, value in options.items() if key.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in POOLINGS.values() or any(key not in POOLINGS for key in others):
        found = named or others or "neither"
        raise InputError(f"distill.teacher: {folder}: expected mean or [CLS] pooling, got {found}")
    limits = read_json(folder / "sentence_bert_config.json") or {}
    return chosen[0], limits.get("max_seq_length")


def read_json(path: Path) -> Any:
    return read_strictly(path) if path.is_file() else None


def fingerprint_of(folder: Path) -> str:
    """Of everything that decides a vector."""
    digest = hashlib.sha256()
    names = ("config.json", "modules.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json",
             "vocab.txt")  # fmt: skip
    for path in [*(folder / name for name in names), *sorted(folder.glob("*.safetensors"))]:
        if path.is_file():
            digest.update(path.name.encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]
