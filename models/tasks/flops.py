"""Matmul FLOPs of learning a task, by the rules of ``models/flops.py``: encoders, pools and what answers.

D texts, Q questions or B pairs, C concepts of a text, K of a question, L labels, d model width, k width of the keys, I
feed-forward width.
"""

from dataclasses import replace

from torch import Tensor

from ..config import ConceptConfig
from ..flops import BACKWARD, Sizes, decoder, encoder_flops, queries, resized, training_flops
from ..packing import Packed
from .heads import feature_width
from .pooling import DECODER_POOLS


def of_texts(packed: Packed) -> Sizes:
    """Texts of which every token is read, and a decoder asked for every token where there is one."""
    B, T, longest = packed.num_sequences, packed.num_tokens, packed.max_seqlen
    return Sizes(B, T, 0, T, longest, longest, packed.states is not None)


def pair_flops(config: ConceptConfig, a: Packed, b: Packed, is_encoder_trained: bool = True) -> int:
    """Of a step of a ``ConceptForSequenceClassification`` over pairs of which each text is read by itself."""
    encoders = sum(encoder_step(config, of_texts(packed), is_encoder_trained) for packed in (a, b))
    return encoders + (1 + BACKWARD) * pair_head(config, a, b)


def pair_head(config: ConceptConfig, a: Packed, b: Packed) -> int:
    """Pools of both texts, and 2 B w L of a classifier of w features."""
    pools = 0 if config.pair_features == "slots" else sum(pool(config, of_texts(packed)) for packed in (a, b))
    return pools + 2 * a.num_sequences * feature_width(config) * config.num_labels


def pool(config: ConceptConfig, sizes: Sizes) -> int:
    """Of P scores or queries:

        weighted, attention      2 B C d P
        cls_query, multi_query   4 B C d k  +  4 B P C d  +  2 B P d^2  +  6 B P d I
        decoder...               the decoder's rows at every token
    """
    B, C, d = sizes.num_sequences, config.num_concepts, config.hidden_size
    if config.pool == "mean":
        return 0
    if config.pool in DECODER_POOLS:
        return decoder(config, sizes)
    if config.pool in ("weighted", "attention"):
        return 2 * B * C * d * (1 if config.pool == "weighted" else config.num_attention_heads)
    P, k = 1 if config.pool == "cls_query" else config.num_pool_queries, config.num_key_value_heads * config.head_dim
    return 4 * B * C * d * k + 4 * B * P * C * d + 2 * B * P * d * d + 6 * B * P * d * config.intermediate_size


def questions_flops(
    config: ConceptConfig, texts: Packed, questions: Packed, owners: Tensor, is_encoder_trained: bool = True
) -> int:  # fmt: skip
    """Of a step of a ``ConceptForQuestions``. Where questions are read with the text, it waits for the device: it must
    know how long the texts of all questions are."""
    K = config.num_question_concepts
    asked = encoder_step(resized(config, K), of_texts(questions), is_encoder_trained)
    if not config.asked_reading:
        read = encoder_step(config, of_texts(texts), is_encoder_trained)
    else:
        read = asked_reading(config, texts, owners, is_encoder_trained)
    return asked + read + (1 + BACKWARD) * answer(config, questions.num_sequences)


def asked_reading(config: ConceptConfig, texts: Packed, owners: Tensor, is_encoder_trained: bool) -> int:
    """Each text once by the backbone, and once for each of its questions by C + K rows, of which C are made anew."""
    num_tokens = int(texts.cu_seqlens.diff()[owners].sum())
    sizes, C = of_texts(texts), config.num_concepts
    again = replace(sizes, num_sequences=len(owners), num_tokens=num_tokens, num_rows=num_tokens, are_stored=True)
    wide = resized(config, C + config.num_question_concepts)
    times = 1 + BACKWARD * is_encoder_trained
    of_backbone = encoder_step(config, sizes, is_encoder_trained, parts=("backbone",))
    others = [part for part in encoder_flops(config, sizes) if part not in ("backbone", "concepts")]
    return of_backbone + encoder_step(wide, again, is_encoder_trained, parts=others) + times * queries(config)


def answer(config: ConceptConfig, num_questions: int) -> int:
    """2 Q K d^2  +  2 Q R d^2  +  4 Q K R d  +  2 Q (4 d + 1) L  of R concepts that a question looks at."""
    Q, d, K = num_questions, config.hidden_size, config.num_question_concepts
    R = config.num_concepts + (K if config.asked_reading else 0)
    return 2 * Q * (K + R) * d * d + 4 * Q * K * R * d + 2 * Q * (4 * d + 1) * config.num_labels


def encoder_step(
    config: ConceptConfig, sizes: Sizes, is_trained: bool, parts: tuple[str, ...] | list[str] | None = None
) -> int:  # fmt: skip
    """Forward and backward; forward alone where it is not trained. ``parts``: only these."""
    flops = training_flops(config, sizes, encoder_flops) if is_trained else encoder_flops(config, sizes)
    return sum(flops[part] for part in (flops if parts is None else parts))
