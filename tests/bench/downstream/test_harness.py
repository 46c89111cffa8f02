"""The model behind lm-evaluation-harness's own interface."""

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from conceptron.bench.downstream.harness import ConceptLM
from conceptron.engine.data import tokenizer
from conceptron.engine.errors import InputError
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM

SHAPE = dict(hidden_size=32, num_concepts=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
             num_decoder_layers=1)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("harness")
    words = tokenizer.train(["the cat sat on the mat", "a dog ran to the door"], 300)
    torch.manual_seed(0)
    config = ConceptConfig(vocab_size=len(words), mask_token_id=words.mask_token_id, **SHAPE)
    for kind, name in ((ConceptForMaskedLM, "lm"), (ConceptEncoder, "encoder")):
        kind(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


def asked(*args) -> Instance:
    return Instance("loglikelihood", {}, args, 0)


def test_likelihoods_are_those_of_each_request_alone(place):
    model = ConceptLM(place / "lm")
    assert isinstance(model, LM)
    requests = [asked("the cat", " sat"), asked("the cat", " ran to the door"), asked("a dog", " sat"), asked("", "x")]
    together = model.loglikelihood(requests)
    for request, (score, is_best) in zip(requests, together, strict=True):
        ((alone, best),) = model.loglikelihood([request])
        assert score == pytest.approx(alone, abs=1e-4) and best == is_best and score < 0
    assert model.loglikelihood_rolling([asked("x")])[0] == pytest.approx(together[3][0], abs=1e-4)
    (ids,) = model.vocabulary.encode([" sat"])
    logits = model.predicted(model.vocabulary.encode(["the cat"]), [len(ids)])
    assert together[0][0] == pytest.approx(float(logits.log_softmax(-1)[range(len(ids)), ids].sum()), abs=1e-4)


def test_text_ends_where_the_task_says(place):
    model = ConceptLM(place / "lm", steps=2)
    (whole,) = model.generate_until([asked("the cat", {"max_gen_toks": 6})])
    assert whole
    stop = whole[len(whole) // 2]
    (cut,) = model.generate_until([asked("the cat", {"max_gen_toks": 6, "until": [stop]})])
    assert cut == whole.partition(stop)[0]


def test_an_encoder_alone_is_refused(place):
    with pytest.raises(InputError, match="a ConceptEncoder has no decoder"):
        ConceptLM(place / "encoder")
