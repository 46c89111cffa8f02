"""Heads of tasks: classification and regression of a text or a pair, multiple choice, spans of an answer.

Concepts are all that a head sees, unless its pool says otherwise; ``ablate=`` takes them away to prove it.

B texts, K choices, N tokens of one text, T packed tokens, C concepts, L labels, d model width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..config import ConceptConfig
from ..door import open_door
from ..encoder import ConceptEncoderOutput
from ..layers import RowNorm, ZeroLinear
from ..packing import Packed
from ..similarity import unit, wide
from .model import ConceptPooledModel, ConceptTaskModel
from .pooling import reduce_rows

IGNORE = -100  # the label that transformers gives to what is not asked


@dataclass
class ConceptTaskOutput(ModelOutput):
    loss: Tensor | None = None  # 0-d
    logits: Tensor | None = None  # [B, L]; of a regression the predicted values; of multiple choice [B, K]
    concepts: Tensor | None = None  # [B, C, d] as the head saw them; of a pair those of the first text
    hidden_states: tuple[Tensor, ...] | None = None  # of the concepts, as the encoder gives them, likewise


@dataclass
class ConceptSpanOutput(ModelOutput):
    loss: Tensor | None = None  # 0-d
    start_logits: Tensor | None = None  # [B, N], the lowest number at padding; [T] for a packed batch
    end_logits: Tensor | None = None
    concepts: Tensor | None = None  # [B, C, d]
    hidden_states: tuple[Tensor, ...] | None = None  # of the concepts, as the encoder gives them


class ConceptForSequenceClassification(ConceptPooledModel):
    """Labels of a text, or of a pair of texts.

    ``problem_type`` as in transformers: "regression" (one label), "single_label_classification" (whole-numbered labels)
    or "multi_label_classification", told from ``num_labels`` and the labels where the configuration is silent.

    Pairs. ``pair = "joint"``: the two texts are one sequence, joined with a separator by the tokenizer, and this class
    sees no difference to a single text. ``pair = "separate"``: each is encoded by itself; ``pair_features`` of the
    pooled texts a, b are

        concat   [a, b, |a - b|, a * b], ordered;
        cosine   cos(a, b) as the predicted value itself, without a weight: of a regression with one label;
        slots    the cosine of concept c of one text with concept c of the other, for each c: no pool.

    Regression predicts label_offset + label_scale * x, and its loss is the mean of (x - (label - offset) / scale)^2.
    x starts at zero, so set offset and scale to mean and standard deviation of the training labels: left at 0 and 1, a
    head with a small learning rate spends half of a short run on finding the mean. Cosines: offset is the label of
    unrelated texts and offset + scale that of equal ones, 0 and 5 for STS-B.
    """

    RESIZE: ClassVar = {"classifier.weight": ("labels", "concepts")}  # of slots; the others do not follow C

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        width, is_bare = feature_width(config), config.pair == "separate" and config.pair_features != "concat"
        self.norm = None if is_bare else RowNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = ZeroLinear(width, config.num_labels) if width else None
        if config.problem_type is None and config.num_labels == 1:
            config.problem_type = "regression"  # else transformers' pipeline takes a sigmoid of the score
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        packed: Packed | None = None, input_ids_b: Tensor | None = None, attention_mask_b: Tensor | None = None,
        packed_b: Packed | None = None, num_concepts: int | None = None, ablate: str | None = None,
        cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None,
        max_length_k: int | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> ConceptTaskOutput | tuple:  # fmt: skip
        """
        Args:
            input_ids, attention_mask: [B, N]; or packed: B packed texts; or another form of ``door.open_door``.
            token_type_ids: not read: the separator says which of two texts a token is of.
            input_ids_b, attention_mask_b, packed_b: the second texts of separate pairs, likewise.
            labels: [B] whole numbers, -100 for none; [B] or [B, L] values, any number; [B, L] of 0 and 1, -100 for
                none. On any device. The first that come settle ``config.problem_type``, as in transformers.
            num_concepts: C of this call, see ``ConceptEncoder``.
            ablate: None, "zero" or "shuffle" (``ablation.ablated``); both texts of a pair then move together.

        Raises:
            ValueError: a text is missing, one too many came, or a shape does not fit.
        """
        with_states, as_dict = self.wants(output_attentions, output_hidden_states, return_dict)
        packed = open_door(
            input_ids, attention_mask, packed, inputs_embeds=inputs_embeds, position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q,
            max_length_k=max_length_k,
        ).packed  # fmt: skip
        encoded = self.read(packed, ablate, num_concepts, with_states)
        if self.config.pair == "separate":
            packed_b = open_door(input_ids_b, attention_mask_b, packed_b, suffix="_b").packed
            if packed_b.num_sequences != packed.num_sequences:
                raise ValueError(
                    f"input_ids_b: expected {packed.num_sequences} texts, as many as the first of each pair, "
                    f"got {packed_b.num_sequences}"
                )
            x_BL = self.compare(encoded, packed, self.read(packed_b, ablate, num_concepts), packed_b)
        elif packed_b is not None or input_ids_b is not None:
            raise ValueError("input_ids_b: config.pair is 'joint': give both texts as one sequence, or set 'separate'")
        else:
            x_BL = self.classifier(self.dropout(self.norm(self.pooled(encoded, packed))))
        result = ConceptTaskOutput(logits=x_BL, concepts=encoded.last_hidden_state)
        result.hidden_states = encoded.hidden_states
        kind = problem_type(self.config, labels)
        if kind == "regression":
            result.logits = self.config.label_offset + self.config.label_scale * wide(x_BL)  # 16 bits would tie values
        if labels is not None:
            result.loss = label_loss(self.config, kind, x_BL, labels)
            self.config.problem_type = kind  # so that a saved model says what its logits are
        return result if as_dict else result.to_tuple()

    def compare(
        self, encoded_a: ConceptEncoderOutput, packed_a: Packed, encoded_b: ConceptEncoderOutput, packed_b: Packed
    ) -> Tensor:
        """[B, L] of two texts."""
        if self.config.pair_features == "slots":
            cosines_BC = (unit(encoded_a.last_hidden_state) * unit(encoded_b.last_hidden_state)).sum(-1)
            if cosines_BC.shape[1] != self.config.num_concepts:
                raise ValueError(
                    f"num_concepts: expected the model's C = {self.config.num_concepts} with pair_features = slots, "
                    f"which has a weight for each, got {cosines_BC.shape[1]}"
                )
            return self.classifier(cosines_BC.to(encoded_a.last_hidden_state.dtype))
        a_Bd, b_Bd = self.pooled(encoded_a, packed_a), self.pooled(encoded_b, packed_b)
        if self.config.pair_features == "cosine":
            return (unit(a_Bd) * unit(b_Bd)).sum(-1, keepdim=True)
        a_Bd, b_Bd = self.dropout(self.norm(a_Bd)), self.dropout(self.norm(b_Bd))
        return self.classifier(torch.cat((a_Bd, b_Bd, (a_Bd - b_Bd).abs(), a_Bd * b_Bd), dim=-1))


class ConceptForMultipleChoice(ConceptPooledModel):
    """Which of K texts answers: one score each, a softmax over the K texts of a question."""

    def __init__(self, config: ConceptConfig):
        super().__init__(config)
        self.norm = RowNorm(config.hidden_size, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = ZeroLinear(config.hidden_size, 1, bias=False)  # a bias would shift all choices alike
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        packed: Packed | None = None, num_choices: int | None = None, num_concepts: int | None = None,
        ablate: str | None = None, cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None,
        max_length_q: int | None = None, max_length_k: int | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> ConceptTaskOutput | tuple:  # fmt: skip
        """
        Args:
            input_ids (or inputs_embeds), attention_mask, position_ids: [B, K, N], each choice with its question; or the
                B * K texts, question by question, with num_choices K: packed, or [1, T] with cu_seq_lens_q.
            token_type_ids: not read: the separator says which of two texts a token is of.
            labels: [B] which choice is right, -100 for none.
            num_concepts: C of this call, see ``ConceptEncoder``.
            ablate: None, "zero", or "shuffle": choice k gets the concepts of choice k of another question.

        Raises:
            ValueError: a shape does not fit.
        """
        with_states, as_dict = self.wants(output_attentions, output_hidden_states, return_dict)
        texts, num_dims = (input_ids, 3) if inputs_embeds is None else (inputs_embeds, 4)
        if texts is not None and cu_seq_lens_q is None:
            if texts.ndim != num_dims:
                name, e = ("input_ids", "") if num_dims == 3 else ("inputs_embeds", ", e")
                raise ValueError(f"{name}: expected shape [B, K, N{e}], got {list(texts.shape)}")
            num_choices = texts.shape[1]
            input_ids, inputs_embeds, attention_mask, position_ids = (
                None if x is None else x.flatten(0, 1) for x in (input_ids, inputs_embeds, attention_mask, position_ids)
            )
        packed = open_door(
            input_ids, attention_mask, packed, inputs_embeds=inputs_embeds, position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q,
            max_length_k=max_length_k,
        ).packed  # fmt: skip
        if not num_choices or packed.num_sequences % num_choices:
            raise ValueError(
                f"num_choices: expected a divisor of the {packed.num_sequences} packed texts, got {num_choices}"
            )
        encoded = self.read(packed, ablate, num_concepts, with_states, num_choices)
        scores = self.classifier(self.dropout(self.norm(self.pooled(encoded, packed))))
        result = ConceptTaskOutput(logits=scores.view(-1, num_choices), concepts=encoded.last_hidden_state)
        result.hidden_states = encoded.hidden_states
        if labels is not None:
            result.loss = class_loss(result.logits, labels)
        return result if as_dict else result.to_tuple()


class ConceptForQuestionAnswering(ConceptTaskModel):
    """Where in the text the answer starts and ends: two scores at every token, each a softmax over the text.

    The scores are linear in the decoder's row at that token, which reads the C concepts: O(C * N), and no token sees
    another but through them. With token+position queries a row knows its own token, with position queries nothing.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__(config, reads_rows=True)
        self.dropout = nn.Dropout(config.dropout)
        self.qa_outputs = ZeroLinear(config.hidden_size, 2, bias=False)  # a bias would shift all tokens alike
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        start_positions: Tensor | None = None, end_positions: Tensor | None = None, *,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        packed: Packed | None = None, num_concepts: int | None = None, ablate: str | None = None,
        cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None,
        max_length_k: int | None = None, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> ConceptSpanOutput | tuple:  # fmt: skip
        """
        Args:
            input_ids, attention_mask: [B, N], question and text with a separator between them; or packed; or another
                form of ``door.open_door``.
            token_type_ids: not read: the separator says which of two texts a token is of.
            start_positions, end_positions: [B] columns of input_ids, or for texts end to end (packed, [1, T]) rows
                counted from the start of each. What lies outside the text (or on padding) is not asked, as in
                transformers.
            num_concepts: C of this call, see ``ConceptEncoder``.
            ablate: None, "zero" or "shuffle" (``ablation.ablated``).

        Raises:
            ValueError: only one of start and end came, or a shape does not fit.
        """
        if (start_positions is None) != (end_positions is None):
            raise ValueError("end_positions: expected both start_positions and end_positions, or neither")
        with_states, as_dict = self.wants(output_attentions, output_hidden_states, return_dict)
        door = open_door(
            input_ids, attention_mask, packed, inputs_embeds=inputs_embeds, position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q,
            max_length_k=max_length_k,
        )  # fmt: skip
        packed = door.packed
        encoded = self.read(packed, ablate, num_concepts, with_states)
        scores_T2 = self.qa_outputs(self.dropout(self.rows(encoded, packed)))
        result = ConceptSpanOutput(concepts=encoded.last_hidden_state)
        result.hidden_states = encoded.hidden_states
        if start_positions is not None:
            spans_B2 = torch.stack((start_positions, end_positions), dim=1).to(scores_T2.device)
            if spans_B2.shape[0] != packed.num_sequences:
                raise ValueError(f"start_positions: expected shape [{packed.num_sequences}], got [{spans_B2.shape[0]}]")
            if door.valid is not None:
                spans_B2 = rows_of_columns(spans_B2, door.valid)
            result.loss = span_loss(scores_T2, packed, spans_B2)
        result.start_logits, result.end_logits = door.spread(scores_T2, torch.finfo(scores_T2.dtype).min).unbind(-1)
        return result if as_dict else result.to_tuple()


def feature_width(config: ConceptConfig) -> int:
    """How many numbers the classifier of a text or a pair reads; 0 where there is no classifier.

    Raises:
        ValueError: a cosine for other than one label, which is all it can predict.
    """
    if config.pair == "joint":
        return config.hidden_size
    if config.pair_features == "cosine" and config.num_labels != 1:
        raise ValueError(f"num_labels: expected 1 with pair_features = cosine, a regression, got {config.num_labels}")
    return {"concat": 4 * config.hidden_size, "cosine": 0, "slots": config.num_concepts}[config.pair_features]


def problem_type(config: ConceptConfig, labels: Tensor | None) -> str | None:
    """transformers' rule: what the configuration says, else by the number of labels and their type."""
    if config.problem_type is not None or config.num_labels == 1:
        return config.problem_type or "regression"
    if labels is None:
        return None
    is_whole = not labels.is_floating_point() and labels.dtype != torch.bool
    return "single_label_classification" if is_whole and labels.ndim == 1 else "multi_label_classification"


def label_loss(config: ConceptConfig, kind: str, x_BL: Tensor, labels: Tensor) -> Tensor:
    """The mean over the labels of what ``kind`` calls for, 0-d; 0 without. -100: none, but a value to regression."""
    if kind == "single_label_classification":
        return class_loss(x_BL, labels)
    if labels.numel() != x_BL.numel():
        raise ValueError(f"labels: expected shape {list(x_BL.shape)}, got {list(labels.shape)}")
    x_BL = wide(x_BL)
    values_BL = labels.to(x_BL.device, x_BL.dtype).view_as(x_BL)
    if kind == "regression":
        losses = (x_BL - (values_BL - config.label_offset) / config.label_scale).square()
        return losses.sum() / max(losses.numel(), 1)
    is_asked = values_BL != IGNORE
    losses = F.binary_cross_entropy_with_logits(x_BL, values_BL.where(is_asked, 0), weight=is_asked, reduction="sum")
    return losses / is_asked.sum().clamp_min(1)


def class_loss(logits_BL: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mean over the labels that are not -100; 0 where there are none."""
    if labels.numel() != logits_BL.shape[0]:
        raise ValueError(f"labels: expected shape [{logits_BL.shape[0]}], got {list(labels.shape)}")
    labels_B = labels.to(logits_BL.device).view(-1).long()
    total = F.cross_entropy(wide(logits_BL), labels_B, ignore_index=IGNORE, reduction="sum")
    return total / (labels_B != IGNORE).sum().clamp_min(1)


def rows_of_columns(columns_B2: Tensor, valid_BN: Tensor) -> Tensor:
    """Columns of a padded batch -> rows counted from the start of each text, -1 outside the text."""
    N = valid_BN.shape[1]
    if N == 0:
        return torch.full_like(columns_B2, -1)
    at_B2 = columns_B2.clamp(0, N - 1)
    is_token = valid_BN.gather(1, at_B2) & (columns_B2 == at_B2)
    return torch.where(is_token, valid_BN.cumsum(1).gather(1, at_B2) - 1, -1)


def span_loss(scores_T2: Tensor, packed: Packed, spans_B2: Tensor) -> Tensor:
    """Cross entropy of start and end among the tokens of each text, the mean over what is asked, 0-d.

    A row outside its text is not asked. Start and end count alike, as in transformers' question answering.
    """
    scores_T2 = wide(scores_T2)
    if packed.num_tokens == 0:
        return scores_T2.sum()
    lengths_B1 = packed.cu_seqlens.diff()[:, None]
    is_text_B1 = lengths_B1 > 0
    top_B2 = torch.where(is_text_B1, reduce_rows(scores_T2.detach(), packed.cu_seqlens, "max", -torch.inf), 0)
    shifted_T2 = (scores_T2 - top_B2[packed.sequence_ids()]).exp()
    sums_B2 = reduce_rows(shifted_T2, packed.cu_seqlens, "sum", 0.0)
    is_asked = (spans_B2 >= 0) & (spans_B2 < lengths_B1)
    rows_B2 = (packed.cu_seqlens[:-1, None] + torch.where(is_asked, spans_B2, 0)).clamp_max(packed.num_tokens - 1)
    nll_B2 = top_B2 + torch.where(is_text_B1, sums_B2, 1).log() - scores_T2.gather(0, rows_B2.long())
    return (nll_B2 * is_asked).sum() / is_asked.sum().clamp_min(1)
