"""The multi-vector form of a model in sentence-transformers: its `MultiVectorEncoder`, whose score is MaxSim.

B texts, N tokens of the longest, C concepts, d width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sentence_transformers import MultiVectorEncoder
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from .model import ConceptModel


class Concepts(InputModule):
    """Texts -> concepts [B, C, d] of a document; one vector [B, 1, d] of a query, see ``ConceptModel.embed_queries``.

    The library's own modules would take one vector a token; concepts are as many for every text, so each counts.
    """

    forward_kwargs = {"task"}  # noqa: RUF012 as the library has it

    def __init__(self, model: ConceptModel) -> None:
        super().__init__()
        self.model, self.encoder = model, model.encoder
        self.tokenizer = model.vocabulary.tokenizer

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, Any]:
        """Texts stay texts until ``forward``, where they are packed."""
        return {"texts": [f"{prompt or ''}{text}" for text in inputs]}

    def forward(self, features: dict[str, Any], task: str | None = None, **_: Any) -> dict[str, Any]:
        """Adds ``token_embeddings`` and the ``attention_mask`` that says that all of them count."""
        texts = features["texts"]
        found = self.model.embed_queries(texts)[:, None] if task == "query" else self.model.concepts(texts)[0]
        vectors: Tensor = torch.from_numpy(found).to(self.model.device)
        return {**features, "token_embeddings": vectors, "attention_mask": vectors.new_ones(vectors.shape[:2])}

    def get_embedding_dimension(self) -> int:
        return self.model.width

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """
        Raises:
            ValueError: a folder of the library would need this package's code; the model has a folder of its own.
        """
        raise ValueError(f"save: the model is in {self.model.folder}; copy that, and wrap it again where it is used")


def multi_vector_encoder(model: ConceptModel) -> MultiVectorEncoder:
    """`encode_query`, `encode_document` and `similarity` (MaxSim) of the library, on a finished model."""
    return MultiVectorEncoder(modules=[Concepts(model)], device=str(model.device))
