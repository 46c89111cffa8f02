"""ConceptForMaskedLM: encoder, decoder and a language-model head that only ever sees the target rows.

B sequences, T packed tokens, N tokens of one sequence, M target rows, V vocabulary, d model width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from . import attention_maps
from .ablation import ablated
from .config import ConceptConfig
from .decoder import ConceptDecoder
from .door import open_door
from .encoder import ConceptEncoder, ConceptEncoderOutput
from .exposure import Exposure
from .layers import LanguageModelHead
from .objectives.view import View
from .packing import Packed
from .pretrained import ConceptPreTrainedModel

IGNORE = -100  # the label that transformers gives to rows without a target


@dataclass
class ConceptMaskedLMOutput(ModelOutput):
    loss: Tensor | None = None  # 0-d
    logits: Tensor | None = None  # [B, N, V], zero at padding, or [1, T, V]; None in a training step
    concepts: Tensor | None = None  # [B, C, d]
    nll: Tensor | None = None  # [M] float32, one a target, smoothed if the loss is
    hidden_states: tuple[Tensor, ...] | None = None  # of the concepts, as the encoder gives them
    token_states: Tensor | None = None  # [B, N, d] the decoder's row at every token, zero at padding; of a view [M, d]
    attentions: tuple[Tensor, ...] | None = None  # with which concepts read tokens, as the encoder gives them


class ConceptForMaskedLM(ConceptPreTrainedModel):
    """Predicts hidden tokens from concepts. One class trains on every objective.

    Two doors. ``view=``: a ``View`` of packed text, as the objectives make it; the loss is
    sum_i weights_i * nll_i / divisor. ``input_ids`` with ``attention_mask`` and ``labels``: padded, as any
    masked language model of transformers takes them.
    """

    hands_attentions_on = True
    accepts_loss_kwargs = True  # transformers' Trainer then passes num_items_in_batch and leaves the division to us

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        self.encoder = ConceptEncoder(config)
        self.exposure = Exposure(config)
        self.decoder = ConceptDecoder(config)
        self.lm_head = LanguageModelHead(config)
        self._tied_weights_keys = {"lm_head.weight": f"encoder.{self.encoder.embeddings_name}"}
        if config.decoder_queries == "token+position":
            self._tied_weights_keys["decoder.embed_tokens.weight"] = f"encoder.{self.encoder.embeddings_name}"
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        view: View | None = None, encoded: ConceptEncoderOutput | None = None, timesteps: Tensor | None = None,
        smoothing: float = 0.0, return_nll: bool = False, num_iterations: int | None = None,
        num_concepts: int | None = None, num_items_in_batch: Tensor | int | None = None, ablate: str | None = None,
        cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None,
        max_length_k: int | None = None, output_token_states: bool = False, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> ConceptMaskedLMOutput | tuple:  # fmt: skip
        """
        Args:
            input_ids, attention_mask, labels: [B, N], or [1, T] with cu_seq_lens_q, or inputs_embeds in place of ids:
                see ``door.open_door``; labels are ids, or -100 where nothing is asked. The encoder reads all tokens of
                the mask ([MASK] tokens left out if ``config.hidden_tokens`` is "drop"; of embeddings nobody can tell).
            token_type_ids: not read: which of two texts a token is of, the separator says.
            view: instead of them, what an objective made of a packed batch.
            encoded: what the encoder made of the text, where that is known already; also how to encode with another C:
                ``model.encoder(..., num_concepts=C)``.
            timesteps: [B], for ``input_ids`` and a model with timestep_conditioning; by default the share of [MASK].
            smoothing: label smoothing of the cross entropy; keep 0 in evaluation. (transformers' Trainer takes every
                argument with "label" in its name for labels that a batch must have.)
            return_nll: also return the loss of each target.
            num_iterations: of a tied encoder, see ``ConceptEncoder``; a training step whose iterations are to be drawn
                needs what ``recursion.draw_iterations`` drew, the same on every rank.
            num_concepts: the decoder gets only so many concepts, the first in ``exposure.nested_order``; by default
                all, and in training what the configuration leaves it.
            num_items_in_batch: with labels, what their sum is divided by; by default their number.
            ablate: None, "zero" or "shuffle": what the loss is without the concepts of the text (``ablation.ablated``).
            output_token_states: also the decoder's row at every token, where logits are made; of a view [M, d].
            output_hidden_states, output_attentions, return_dict: as in transformers; None: what the configuration says.
                Hidden states and attentions are the encoder's; of a view, or of what is encoded, there are none.

        Returns:
            loss if there are targets; logits if there are none, and with labels in eval mode; concepts always.

        Raises:
            ValueError: the inputs name neither or both doors, a shape does not fit, or attentions cannot be given.
        """
        with_states, as_dict = self.wants(output_attentions, output_hidden_states, return_dict)
        if (view is None) == (input_ids is None and inputs_embeds is None):
            raise ValueError("input_ids: expected either input_ids [B, N] or view, got both or neither")
        is_drawn = self.training and self.config.iteration_sampling == "random" and encoded is None
        if is_drawn and num_iterations is None:
            raise ValueError(
                "num_iterations: iteration_sampling is random, so a training step needs it; recursion.draw_iterations "
                "draws it from numbers that are the same on every rank"
            )
        if view is not None:
            encoded = self.encode(view.encoder, num_iterations, view.num_concepts) if encoded is None else encoded
            result = self._of_view(view, ablated(encoded, ablate), smoothing, return_nll, num_concepts)
            result.token_states = result.token_states if output_token_states else None
            return result if as_dict else result.to_tuple()
        door = open_door(
            input_ids, attention_mask, inputs_embeds=inputs_embeds, position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q,
            max_length_k=max_length_k,
        )  # fmt: skip
        targets_T, attentions = None if labels is None else door.rows(labels, "labels"), None
        if encoded is None:
            read = self.encoder.visible(self.encoder.bare(door.packed))
            encoded = self.encoder(
                packed=read, num_iterations=num_iterations, output_hidden_states=with_states, return_dict=True,
                output_attentions=self.wants_attentions(output_attentions),
            )  # fmt: skip
            if encoded.attentions is not None:
                read_T = None if read is door.packed else self.encoder.rows_read(door.packed)
                attentions = attention_maps.spread(encoded.attentions, door, read_T)
        encoded = ablated(encoded, ablate)
        if timesteps is None and self.config.timestep_conditioning:
            timesteps = self.masked_share(door.packed)
        result = ConceptMaskedLMOutput(concepts=encoded.last_hidden_state, attentions=attentions)
        result.hidden_states = encoded.hidden_states if with_states else None
        seen = self.expose(encoded, num_concepts)
        if targets_T is not None:
            result.loss, result.nll = self._loss_of_rows(
                door.packed, seen, targets_T, timesteps, smoothing, return_nll, num_items_in_batch
            )
        if labels is None or not self.training:
            hidden_Td = self.decode_rows(seen, door.packed, timesteps)
            result.logits = door.spread(self.lm_head(hidden_Td))
            result.token_states = door.spread(hidden_Td) if output_token_states else None
        return result if as_dict else result.to_tuple()

    def _of_view(
        self, view: View, encoded: ConceptEncoderOutput, smoothing: float, return_nll: bool,
        num_concepts: int | None,
    ) -> ConceptMaskedLMOutput:  # fmt: skip
        divisor = torch.where(view.divisor > 0, view.divisor, 1.0)  # a batch without text has loss 0
        hidden_Md = self.decode_view(self.expose(encoded, num_concepts), view)
        loss, nll = self.loss(hidden_Md, view.targets, view.weights, divisor, smoothing, return_nll)
        return ConceptMaskedLMOutput(loss=loss, concepts=encoded.last_hidden_state, nll=nll, token_states=hidden_Md)

    def encode(
        self, packed: Packed, num_iterations: int | None = None, num_concepts: int | None = None
    ) -> ConceptEncoderOutput:
        """With what a training step needs to log: how far iterations still move the concepts."""
        return self.encoder(
            packed=packed, num_iterations=num_iterations, num_concepts=num_concepts, return_dict=True,
            output_convergence=self.training and self.config.tie_layers, output_attentions=False,
        )  # fmt: skip

    def _loss_of_rows(
        self, packed: Packed, encoded: ConceptEncoderOutput, targets_T: Tensor, timesteps: Tensor | None,
        smoothing: float, return_nll: bool, num_items_in_batch: Tensor | int | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        is_asked_T = targets_T != IGNORE
        targets_M = targets_T[is_asked_T]
        if self.mixes_rows:  # the others are context
            hidden_Md = self.decode_rows(encoded, packed, timesteps)[is_asked_T]
        else:
            hidden_Md = self.decode_rows(encoded, packed.select(is_asked_T), timesteps)
        if num_items_in_batch is None:
            num_items_in_batch = is_asked_T.sum().clamp_min(1)
        divisor = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=hidden_Md.device)
        weights_M = torch.ones_like(targets_M, dtype=torch.float32)
        return self.loss(hidden_Md, targets_M, weights_M, divisor, smoothing, return_nll)

    def decode_rows(self, encoded: ConceptEncoderOutput, packed: Packed, timesteps: Tensor | None) -> Tensor:
        """Hidden states [T, d] of the rows at all of these tokens."""
        return self.decoder(
            encoded.last_hidden_state, encoded.anchors, packed.position_ids, packed.cu_seqlens, packed.max_seqlen,
            input_ids=packed.input_ids, timesteps=timesteps, inputs_embeds=packed.embeds,
        )  # fmt: skip

    @property
    def mixes_rows(self) -> bool:
        """Does what the decoder answers at one position depend on its other rows?"""
        return self.config.decoder_mixing != "none"

    def expose(self, encoded: ConceptEncoderOutput, num_concepts: int | None = None) -> ConceptEncoderOutput:
        """What the decoder gets of the concepts: see ``Exposure``."""
        concepts, anchors = self.exposure(encoded.last_hidden_state, encoded.anchors, num_concepts)
        return ConceptEncoderOutput(last_hidden_state=concepts, anchors=anchors)

    def decode_view(self, encoded: ConceptEncoderOutput, view: View) -> Tensor:
        """Hidden states [M, d] of the targets of a view."""
        hidden_Rd = self.decode(
            encoded, view.decoder_position_ids, view.decoder_cu_seqlens, view.decoder_max_seqlen,
            view.decoder_input_ids, view.timesteps,
        )  # fmt: skip
        return hidden_Rd if view.target_rows is None else hidden_Rd[view.target_rows]

    def decode(
        self, encoded: ConceptEncoderOutput, position_ids: Tensor, cu_seqlens: Tensor, max_seqlen: int,
        input_ids: Tensor | None, timesteps: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Hidden states [M, d] of the rows at ``position_ids``."""
        return self.decoder(
            encoded.last_hidden_state, encoded.anchors, position_ids, cu_seqlens, max_seqlen,
            input_ids=input_ids, timesteps=timesteps,
        )  # fmt: skip

    def loss(
        self, hidden_Md: Tensor, targets_M: Tensor, weights_M: Tensor, divisor: Tensor,
        smoothing: float, return_nll: bool,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not return_nll:
            total = self.lm_head(
                hidden_Md, targets_M, token_weight=weights_M, label_smoothing=smoothing, reduction="sum"
            )
            return total / divisor, None
        nll_M = self.lm_head(hidden_Md, targets_M, label_smoothing=smoothing, reduction="none").float()
        return (weights_M * nll_M).sum() / divisor, nll_M

    def masked_share(self, packed: Packed) -> Tensor:
        """[B] share of [MASK] among the tokens of each sequence, at least 0.001: the time a diffusion model is at."""
        if self.config.mask_token_id is None:
            raise ValueError("timesteps: config.mask_token_id is not set, so the time cannot be read from input_ids")
        if packed.embeds is not None:
            raise ValueError("timesteps: expected [B] with inputs_embeds, of which nobody can tell what is hidden")
        is_mask = (packed.input_ids == self.config.mask_token_id).float()
        counts = torch.zeros(packed.num_tokens + 1, device=is_mask.device)
        counts[1:] = is_mask.cumsum(0)
        masked_B = counts[packed.cu_seqlens.long()].diff()
        return (masked_B / packed.cu_seqlens.diff().clamp_min(1)).clamp_min(1e-3)


def smoothing_floor(label_smoothing: float, vocab_size: int) -> float:
    """The least that a smoothed loss can be, in nats per token: the entropy of the smoothed target. It is what a
    perfect predictor has, 1.408 with 0.1 and 50368 words.

        p = 1 - eps + eps/V;    -p ln p - (V - 1) (eps/V) ln(eps/V)
    """
    if label_smoothing == 0:
        return 0.0
    each = label_smoothing / vocab_size
    true = 1 - label_smoothing + each
    return -true * math.log(true) - (vocab_size - 1) * each * math.log(each)
