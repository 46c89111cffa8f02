"""What learning a task costs, against torch's own count of the matrix products that really ran."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from conceptron.models.config import ConceptConfig
from conceptron.models.flops import BACKWARD
from conceptron.models.packing import pack
from conceptron.models.tasks.flops import answer, of_texts, pair_flops, pair_head, questions_flops
from conceptron.models.tasks.heads import ConceptForSequenceClassification
from conceptron.models.tasks.questions import ConceptForQuestions

BERT = {"prefix": [2], "suffix": [3], "config": {
    "model_type": "bert", "vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 66, "_attn_implementation": "eager",
}}  # fmt: skip
FROZEN = {"backbone": BERT, "backbone_window": 64, "init_queries": "state", "backbone_trained": "none"}
OWNERS = torch.tensor([0, 0, 1, 2, 2, 2])
PAIRS = [
    {}, {"pair_features": "cosine", "num_labels": 1}, {"pair_features": "slots"}, {"pool": "weighted"},
    {"pool": "attention"}, {"pool": "cls_query", "num_key_value_heads": 1}, {"pool": "multi_query"},
    {"pool": "decoder"}, {"pool": "decoder_positions", "decoder_queries": "position"}, FROZEN,
]  # fmt: skip
QUESTIONS = [
    {}, {"init_queries": "anchor"}, {"asked_reading": True}, {"asked_reading": True, "init_queries": "anchor"},
    {"asked_reading": True, "num_token_layers": 1, "token_window": 16}, FROZEN, {**FROZEN, "asked_reading": True},
]  # fmt: skip


def configure(**options) -> ConceptConfig:
    fields = {"num_labels": 3, "num_attention_heads": 2, "num_question_concepts": 2, **options}
    return ConceptConfig(
        vocab_size=512, hidden_size=32, num_concepts=16, intermediate_size=48, num_hidden_layers=2,
        num_decoder_layers=2, mask_token_id=1, problem_type="regression", **fields,
    )  # fmt: skip


def texts(count: int, length: int):
    return pack([np.random.default_rng(n).integers(8, 512, length) for n in range(count)])


def attention_flops(q, k, v, *rest, out_val=None, **options):
    (B, H, rows, D), keys = q, k[2]
    return 2 * 2 * B * H * rows * keys * D


def counted(model, **given) -> int:
    formulas = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, torch.no_grad():
        model.eval()(**given)
    return counter.get_total_flops()


def named(options) -> str:
    return " ".join(f"{key}={value}" for key, value in options.items() if key != "backbone") or "default"


@pytest.mark.parametrize("options", PAIRS, ids=named)
def test_of_a_pair_of_texts(options):
    config, a, b = configure(pair="separate", **options), texts(3, 64), texts(3, 32)
    found = counted(ConceptForSequenceClassification(config), packed=a, packed_b=b)
    frozen, head = pair_flops(config, a, b, is_encoder_trained=False), pair_head(config, a, b)
    assert frozen - BACKWARD * head == found
    if "backbone" not in options:
        assert pair_flops(config, a, b) == (1 + BACKWARD) * found


@pytest.mark.parametrize(
    ("options", "are_stored"), [*((options, False) for options in QUESTIONS), *((o, True) for o in QUESTIONS[-2:])],
    ids=lambda given: named(given) if isinstance(given, dict) else ["computed", "stored"][given],
)  # fmt: skip
def test_of_questions_about_texts(options, are_stored):
    config, read, asked = configure(**options), texts(3, 64), texts(len(OWNERS), 16)
    model = ConceptForQuestions(config)
    if are_stored:
        read, asked = (p._replace(states=model.encoder.backbone(p).detach()) for p in (read, asked))
    found = counted(model, texts=read, questions=asked, owners=OWNERS)
    head = answer(config, len(OWNERS))
    assert questions_flops(config, read, asked, OWNERS, is_encoder_trained=False) - BACKWARD * head == found
    whole = questions_flops(config, read, asked, OWNERS)
    assert whole == (1 + BACKWARD) * found if are_stored or "backbone" not in options else whole < 3 * found


def test_sizes_of_texts_ask_the_decoder_for_every_token():
    assert asdict(of_texts(texts(3, 64))) == dict(
        num_sequences=3, num_tokens=192, num_targets=0, num_rows=192, longest=64, longest_rows=64, are_stored=False
    )  # fmt: skip
