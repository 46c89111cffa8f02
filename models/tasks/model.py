"""What every model of a task is built on: the encoder of a checkpoint, its decoder where rows are read, and a report of
what was loaded.

B texts, T packed tokens, d model width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..ablation import ablated
from ..config import ConceptConfig
from ..decoder import ConceptDecoder
from ..encoder import ConceptEncoder, ConceptEncoderOutput
from ..packing import Packed
from ..pretrained import ConceptPreTrainedModel
from .pooling import DECODER_POOLS, concept_pool, mean_of_rows

QUERY_PARTS = ("decoder.query.", "decoder.embed_tokens.", "decoder.widen_tokens.")  # may be new: queries can change
CLEAN_TIME = 1e-3  # of a text without a hidden token, as ConceptForMaskedLM reads it off one


@dataclass(frozen=True)
class LoadReport:
    """Where the weights of a model came from, by name."""

    loaded: tuple[str, ...]
    new: tuple[str, ...]  # initialised: not in the checkpoint, or of another shape there
    unused: tuple[str, ...]  # in the checkpoint, without a place in this model

    def __str__(self) -> str:
        parts = []
        for kind, names in (("loaded", self.loaded), ("new", self.new), ("unused", self.unused)):
            listed = f" ({', '.join(names)})" if names and kind != "loaded" else ""
            parts.append(f"{len(names)} {kind}{listed}")
        return "weights: " + ", ".join(parts)


class ConceptTaskModel(ConceptPreTrainedModel):
    """An encoder, a decoder where the task or ``config.pool`` reads decoder rows, and the door of texts.

    ``from_pretrained`` takes the folder of any model here, such as a masked language model, and options of the
    configuration (``pool=``, ``num_labels=``); ``model.load_report`` then says what was loaded, what is new, and what
    was left in the folder.
    """

    load_report: LoadReport | None = None  # of a model that came from from_pretrained

    def __init__(self, config: ConceptConfig, reads_rows: bool):
        super().__init__(config)
        self.encoder = ConceptEncoder(config)
        self.decoder = ConceptDecoder(config) if reads_rows else None
        if reads_rows and self.decoder.embed_tokens is not None:
            self._tied_weights_keys = {"decoder.embed_tokens.weight": f"encoder.{self.encoder.embeddings_name}"}

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As transformers' own, with ``model.load_report``.

        Raises:
            ValueError: the checkpoint lacks weights of the encoder, or of a decoder that this model reads (those of its
                queries may be new: ``decoder_queries`` can be changed for a task).
        """
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        new = set(info["missing_keys"]) | {name for name, *_ in info["mismatched_keys"]}
        loaded = [name for name, _ in model.named_parameters() if name not in new]
        model.load_report = LoadReport(tuple(loaded), tuple(sorted(new)), tuple(sorted(info["unexpected_keys"])))
        needed = [name for name in sorted(new) if name.startswith(("encoder.", "decoder."))]
        needed = [name for name in needed if not name.startswith(QUERY_PARTS)]
        if needed:
            raise ValueError(
                f"{args[0] if args else 'checkpoint'}: {len(needed)} weights that {cls.__name__} reads are missing or "
                f"of another shape, {needed[0]} among them; give a checkpoint that has them, with its own sizes"
            )
        return (model, info) if output_loading_info else model

    def read(
        self, packed: Packed, ablate: str | None, num_concepts: int | None = None, with_states: bool = False,
        step: int = 1,
    ) -> ConceptEncoderOutput:  # fmt: skip
        """What the encoder makes of the texts; with its hidden states."""
        encoded = self.encoder(
            packed=self.encoder.bare(packed), num_concepts=num_concepts, output_hidden_states=with_states,
            return_dict=True,
        )  # fmt: skip
        return ablated(encoded, ablate, step)

    def rows(self, encoded: ConceptEncoderOutput, packed: Packed) -> Tensor:
        """[T, d]: the decoder's answer at every token. O(C * T)."""
        timesteps = None
        if self.config.timestep_conditioning:  # a query that knows its token sees a clean text, another nothing of it
            time = CLEAN_TIME if self.config.decoder_queries == "token+position" else 1.0
            timesteps = torch.full((packed.num_sequences,), time, device=packed.cu_seqlens.device)
        return self.decoder(
            encoded.last_hidden_state, encoded.anchors, packed.position_ids, packed.cu_seqlens, packed.max_seqlen,
            input_ids=packed.input_ids, timesteps=timesteps, inputs_embeds=packed.embeds,
        )  # fmt: skip


class ConceptPooledModel(ConceptTaskModel):
    """One vector of every text, by ``config.pool``:

        mean                 of the concepts
        weighted, attention  their weighted mean, by one learned score or one per head (``WeightedPool``)
        cls_query            what one learned query reads of them (``QueryPool``)
        multi_query          the mean of what ``num_pool_queries`` read
        decoder              the mean of the decoder's row at every token, whose query knows the token: words reach the
                             result past the concepts, so a score of this pool is no evidence about them
        decoder_positions    the same with queries that only know their position: all comes from the concepts

    The decoder pools read the decoder of the checkpoint, at cost O(C * T).
    """

    def __init__(self, config: ConceptConfig):
        super().__init__(config, reads_rows=config.pool in DECODER_POOLS)
        self.pool = concept_pool(config)

    def pooled(self, encoded: ConceptEncoderOutput, packed: Packed) -> Tensor:
        """[B, d]"""
        if self.pool is not None:
            return self.pool(encoded.last_hidden_state)
        return mean_of_rows(self.rows(encoded, packed), packed.cu_seqlens)
