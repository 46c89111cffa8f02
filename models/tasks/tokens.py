"""A label for every token, read from the concepts.

B texts, N tokens of one text, T packed tokens, C concepts, L labels, d model width.
"""

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.utils import ModelOutput

from ..config import ConceptConfig
from ..door import open_door
from ..layers import ZeroLinear
from ..packing import Packed
from .heads import class_loss
from .model import ConceptTaskModel


@dataclass
class ConceptTokenOutput(ModelOutput):
    loss: Tensor | None = None  # 0-d
    logits: Tensor | None = None  # [B, N, L], zero at padding; [1, T, L] of texts end to end, [T, L] of packed ones
    concepts: Tensor | None = None  # [B, C, d]
    hidden_states: tuple[Tensor, ...] | None = None  # of the concepts, as the encoder gives them
    token_states: Tensor | None = None  # [B, N, d] likewise: what the head read


class ConceptForTokenClassification(ConceptTaskModel):
    """Labels of tokens. The logits are linear in the decoder's row at each token, which reads the C concepts: O(C * N).

    With token+position queries a row knows its own token, with others nothing but what concepts hold; no token sees
    another but through them, unless ``decoder_mixing`` lets it.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__(config, reads_rows=True)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = ZeroLinear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, *,
        token_type_ids: Tensor | None = None, position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None,
        packed: Packed | None = None, num_concepts: int | None = None, ablate: str | None = None,
        cu_seq_lens_q: Tensor | None = None, cu_seq_lens_k: Tensor | None = None, max_length_q: int | None = None,
        max_length_k: int | None = None, output_token_states: bool = False, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None,
    ) -> ConceptTokenOutput | tuple:  # fmt: skip
        """
        Args:
            input_ids, attention_mask: [B, N]; or packed; or another form of ``door.open_door``.
            labels: of the shape of input_ids, -100 where nothing is asked.
            token_type_ids: not read: the separator says which of two texts a token is of.
            num_concepts: C of this call, see ``ConceptEncoder``.
            ablate: None, "zero" or "shuffle" (``ablation.ablated``).
            output_token_states: also what the head read.

        Raises:
            ValueError: not exactly one form of the texts came, or a shape does not fit.
        """
        with_states, as_dict = self.wants(output_attentions, output_hidden_states, return_dict)
        door = open_door(
            input_ids, attention_mask, packed, inputs_embeds=inputs_embeds, position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q, cu_seq_lens_k=cu_seq_lens_k, max_length_q=max_length_q,
            max_length_k=max_length_k,
        )  # fmt: skip
        targets_T = None if labels is None else door.rows(labels, "labels")
        encoded = self.read(door.packed, ablate, num_concepts, with_states)
        rows_Td = self.rows(encoded, door.packed)
        logits_TL = self.classifier(self.dropout(rows_Td))
        result = ConceptTokenOutput(logits=door.spread(logits_TL), concepts=encoded.last_hidden_state)
        result.hidden_states = encoded.hidden_states
        result.token_states = door.spread(rows_Td) if output_token_states else None
        if targets_T is not None:
            result.loss = class_loss(logits_TL, targets_T)
        return result if as_dict else result.to_tuple()
