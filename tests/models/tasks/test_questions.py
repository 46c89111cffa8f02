"""Questions about texts: shapes, what starts as what, asked reading, ablation, and what is refused."""

import pytest
import torch

from conceptron.models.config import ConceptConfig
from conceptron.models.packing import pack
from conceptron.models.tasks.questions import ConceptForQuestions, repeated

SHAPE = dict(vocab_size=50, hidden_size=16, num_concepts=4, num_hidden_layers=1, num_attention_heads=2,
             intermediate_size=16, num_question_concepts=2)  # fmt: skip
OWNERS = torch.tensor([0, 0, 1, 1, 1, 2])


def model(**options) -> ConceptForQuestions:
    torch.manual_seed(0)
    built = ConceptForQuestions(ConceptConfig(**SHAPE, **options)).double().eval()
    with torch.no_grad():  # else everything starts at zero
        built.classifier.weight.normal_()
    return built


@pytest.fixture
def asked() -> tuple:
    random = torch.Generator().manual_seed(0)
    draw = [torch.randint(1, 50, (n,), generator=random) for n in (9, 5, 12, 3, 4, 2, 3, 5, 4)]
    return pack(draw[:3]), pack(draw[3:])


@pytest.mark.parametrize("asked_reading", [False, True])
def test_an_answer_depends_on_its_own_text_and_question_only(asked, asked_reading):
    texts, questions = asked
    built = model(num_labels=3, asked_reading=asked_reading)
    together = built(texts, questions, OWNERS).logits
    assert together.shape == (6, 3)
    for i, owner in enumerate(OWNERS.tolist()):
        text, question = repeated(texts, torch.tensor([owner])), repeated(questions, torch.tensor([i]))
        alone = built(text, question, torch.tensor([0])).logits
        torch.testing.assert_close(together[i : i + 1], alone)


def test_asked_reading_reads_for_the_question(asked):
    """Two questions about one text read other concepts out of it; without asked reading they share them."""
    texts, questions = asked
    for asked_reading in (False, True):
        found = model(num_labels=3, asked_reading=asked_reading)(texts, questions, OWNERS).concepts
        assert found.shape == (6, 6 if asked_reading else 4, 16)
        assert torch.equal(found[0, :4], found[1, :4]) is not asked_reading


def test_the_concepts_of_a_text_are_what_is_taken_away(asked):
    texts, questions = asked
    built = model(num_labels=3)
    whole = built(texts, questions, OWNERS)
    shuffled = built(texts, questions, OWNERS, ablate="shuffle")
    torch.testing.assert_close(shuffled.concepts[0], whole.concepts[5])  # the first text has the last one's
    torch.testing.assert_close(shuffled.concepts[2], whole.concepts[0])
    assert not built(texts, questions, OWNERS, ablate="zero").concepts.any()
    assert not torch.allclose(shuffled.logits, whole.logits)


def test_losses(asked):
    texts, questions = asked
    labels = torch.tensor([0, 1, 2, 0, -100, 1])
    found = model(num_labels=3)(texts, questions, OWNERS, labels)
    kept = labels != -100
    expected = torch.nn.functional.cross_entropy(found.logits[kept], labels[kept])
    torch.testing.assert_close(found.loss.double(), expected)
    built = model(num_labels=1)
    options = built(texts, questions, OWNERS, torch.tensor([1, 0]), num_options=3)
    assert options.logits.shape == (2, 3)
    scale = model(num_labels=1, problem_type="regression", label_offset=3.0, label_scale=2.0)
    values = scale(texts, questions, OWNERS, torch.ones(6))
    torch.testing.assert_close(values.loss.double(), ((values.logits[:, 0] - 3) / 2 - (1 - 3) / 2).square().mean())


@pytest.mark.parametrize("asked_reading", [False, True])
def test_gradients_reach_the_encoder_and_an_empty_batch_is_nothing(asked, asked_reading):
    texts, questions = asked
    built = model(num_labels=3, asked_reading=asked_reading).train()
    built(texts, questions, OWNERS, torch.tensor([0, 1, 2, 0, 1, 2])).loss.backward()
    gradient = built.encoder.embed_tokens.weight.grad
    assert gradient.isfinite().all() and gradient.abs().sum() > 0
    nothing = built(pack([]), pack([]), OWNERS[:0], torch.zeros(0, dtype=torch.int64))
    assert nothing.loss == 0 and nothing.logits.shape == (0, 3)
    nothing.loss.backward()


def test_what_does_not_fit_is_refused(asked):
    texts, questions = asked
    built = model(num_labels=3)
    with pytest.raises(ValueError, match=r"owners: expected shape \[6\], got \[2\]"):
        built(texts, questions, OWNERS[:2])
    with pytest.raises(ValueError, match="num_options: expected a divisor of 6 questions, got 4"):
        built(texts, questions, OWNERS, num_options=4)
    with pytest.raises(ValueError, match="ablate: expected 'zero', 'shuffle' or None, got 'all'"):
        built(texts, questions, OWNERS, ablate="all")
    with pytest.raises(ValueError, match=r"asked: expected shape \[3, Q, 16\]"):
        built.encoder(packed=texts, asked=torch.zeros(2, 1, 16))
