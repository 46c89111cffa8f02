"""Questions about texts that are read by themselves: labels, values, or which of several options.

D texts, Q questions, K concepts of a question, C concepts of a text, L labels, d model width.
"""

import torch
from torch import Tensor, nn

from ..config import ConceptConfig
from ..layers import RowNorm, ZeroLinear
from ..packing import Packed
from ..similarity import unit, wide
from .heads import ConceptTaskOutput, class_loss, label_loss, problem_type
from .model import ConceptTaskModel

SHARPNESS = 20.0  # of the softmax over cosines, with which a question looks a text up


class ConceptForQuestions(ConceptTaskModel):
    """What a text says to a question. The text is read once, however many questions are asked about it.

        q_k = the concepts of the question, K of them;   c_i = those of its text, C of them, all without their rows
        v   = mean_k sum_i softmax_i(SHARPNESS * cos(q_k + query(q_k), c_i + key(c_i))) c_i
        x   = classifier([u, v, |u - v|, u * v, s]),     u = mean_k q_k,  s = mean_k max_i of these cosines

    ``query`` and ``key`` start at zero: a text is first looked up by the cosine of what the encoder makes of both.

    With ``asked_reading`` the question's concepts join those that read the text (``ConceptEncoder.forward``, asked=):
    it is read again for every question, by C + K rows, and v also looks at what the question's own K rows have become.
    Of a frozen backbone the states are made once for all questions.

    Labels as of ``ConceptForSequenceClassification``; with ``num_options`` the questions of a text are options, of
    which one is right, and there is one score each.
    """

    def __init__(self, config: ConceptConfig):
        super().__init__(config, reads_rows=False)
        d = config.hidden_size
        self.query, self.key = ZeroLinear(d, d, bias=False), ZeroLinear(d, d, bias=False)
        self.norm = RowNorm(d, eps=config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = ZeroLinear(4 * d + 1, config.num_labels)
        self.post_init()

    def forward(
        self, texts: Packed, questions: Packed, owners: Tensor, labels: Tensor | None = None, *,
        num_options: int | None = None, num_concepts: int | None = None, ablate: str | None = None,
    ) -> ConceptTaskOutput:  # fmt: skip
        """
        Args:
            texts, questions: D and Q packed sequences.
            owners: [Q] int64, which text a question is about.
            labels: [Q] whole numbers, or values, [Q] or [Q, L]; of options [Q / num_options], which is right.
            num_concepts: C of this call.
            ablate: None, "zero" or "shuffle": all concepts of a text zero, or those of the text before.

        Raises:
            ValueError: a shape does not fit, or there is one text only to shuffle.
        """
        if owners.shape != (questions.num_sequences,):
            raise ValueError(f"owners: expected shape [{questions.num_sequences}], got {list(owners.shape)}")
        asked_QKd = self.encoder(
            packed=questions, num_concepts=self.config.num_question_concepts, return_dict=True
        ).last_hidden_state  # fmt: skip
        if self.config.asked_reading:
            texts = self.with_states(texts)
            read_QCd = self.encoder(
                packed=repeated(texts, owners), num_concepts=num_concepts, asked=asked_QKd, return_dict=True
            ).last_hidden_state  # fmt: skip
            c_QCd, own_QKd = read_QCd[:, : -asked_QKd.shape[1]], read_QCd[:, -asked_QKd.shape[1] :]
            c_QCd = torch.cat((self.own(c_QCd), self.own(own_QKd)), dim=1)
        else:
            read_DCd = self.encoder(packed=texts, num_concepts=num_concepts, return_dict=True).last_hidden_state
            c_QCd = self.own(read_DCd)[owners]
        c_QCd = ablated_texts(c_QCd, owners, texts.num_sequences, ablate)
        x_QL = self.answer(self.own(asked_QKd), c_QCd)
        result = ConceptTaskOutput(logits=x_QL, concepts=c_QCd)
        if num_options is not None:
            if num_options < 2 or x_QL.shape[0] % num_options:
                raise ValueError(f"num_options: expected a divisor of {x_QL.shape[0]} questions, got {num_options}")
            result.logits = x_QL[:, 0].view(-1, num_options)
            result.loss = None if labels is None else class_loss(result.logits, labels)
            return result
        kind = problem_type(self.config, labels)
        if kind == "regression":
            result.logits = self.config.label_offset + self.config.label_scale * wide(x_QL)
        if labels is not None:
            result.loss = label_loss(self.config, kind, x_QL, labels)
            self.config.problem_type = kind
        return result

    def answer(self, q_QKd: Tensor, c_QCd: Tensor) -> Tensor:
        """[Q, L]"""
        cosines_QKC = unit(q_QKd + self.query(q_QKd)) @ unit(c_QCd + self.key(c_QCd)).transpose(1, 2)
        weights_QKC = (SHARPNESS * cosines_QKC).softmax(-1).to(c_QCd.dtype)
        found_Qd, mean_Qd = self.norm((weights_QKC @ c_QCd).mean(1)), self.norm(q_QKd.mean(1))
        u_Qd, v_Qd = self.dropout(mean_Qd), self.dropout(found_Qd)
        nearness_Q1 = cosines_QKC.amax(-1).mean(1, keepdim=True).to(c_QCd.dtype)
        return self.classifier(torch.cat((u_Qd, v_Qd, (u_Qd - v_Qd).abs(), u_Qd * v_Qd, nearness_Q1), dim=-1))

    def own(self, c_QCd: Tensor) -> Tensor:
        """Concepts without the rows that all texts share, where they start from a backbone's states."""
        if self.config.init_queries != "state":
            return c_QCd
        return c_QCd - self.encoder.concepts.rows(c_QCd.shape[1]).to(c_QCd.dtype)

    def with_states(self, texts: Packed) -> Packed:
        backbone = self.encoder.backbone
        return texts if backbone is None or texts.states is not None else texts._replace(states=backbone(texts))


def ablated_texts(c_QCd: Tensor, owners: Tensor, num_texts: int, ablate: str | None) -> Tensor:
    if ablate is None:
        return c_QCd
    if ablate not in ("zero", "shuffle"):
        raise ValueError(f"ablate: expected 'zero', 'shuffle' or None, got {ablate!r}")
    if ablate == "zero":
        return torch.zeros_like(c_QCd)
    if num_texts < 2:
        raise ValueError("ablate: 'shuffle' needs two texts in a batch or more, got 1")
    firsts = [int((owners == text).nonzero()[0]) for text in range(num_texts)]  # a question about each text
    others = torch.tensor([firsts[(int(owner) - 1) % num_texts] for owner in owners], device=c_QCd.device)
    return c_QCd[others]


def repeated(packed: Packed, owners: Tensor) -> Packed:
    """[Q] numbers of texts -> Q texts, with their states. Their number of tokens is read back from the device."""
    starts_Q, lengths_Q = packed.cu_seqlens[:-1].long()[owners], packed.cu_seqlens.diff().long()[owners]
    cu_seqlens = torch.zeros(len(owners) + 1, dtype=torch.int32, device=owners.device)
    cu_seqlens[1:] = lengths_Q.cumsum(0)
    total = int(cu_seqlens[-1])
    rows = torch.arange(total, device=owners.device)
    rows = rows + (starts_Q - cu_seqlens[:-1]).repeat_interleave(lengths_Q, output_size=total)
    states = None if packed.states is None else packed.states[rows]
    extents = None if packed.extents is None else packed.extents[owners]
    return Packed(packed.input_ids[rows], packed.position_ids[rows], cu_seqlens, packed.max_seqlen, extents, states)
