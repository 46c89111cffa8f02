"""What concepts read, told from attention maps built by hand."""

import math

import numpy as np
import pytest
import torch

from conceptron.bench.analysis import reads
from conceptron.engine.data.windows import Part, Windows
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder


def shares_of(weights):
    return weights / weights.sum(0)


def tally(weights, labels=None, sizes=None):
    found = reads.Tally(len(weights), sizes or {})
    readers = found.add(weights, shares_of(weights), labels or {})
    return found, readers


def test_each_its_own_token():
    """Four concepts, four tokens, one each: nothing is shared, every place and every word is known."""
    weights = torch.eye(4)
    labels = {"token": torch.tensor([5, 6, 7, 8]), "position": torch.arange(4)}
    found, readers = tally(weights, labels, {"token": 9, "position": 4})
    assert readers.tolist() == [0, 1, 2, 3]
    figures = found.figures()
    assert figures["usage_perplexity"] == pytest.approx(4)
    assert figures["js_divergence"] == pytest.approx(1)
    assert figures["read_entropy"] == pytest.approx(0) and figures["read_width"] == pytest.approx(0)
    slots = found.slots({i: str(i) for i in range(9)}, torch.full((9,), 100))
    assert [slot.centre for slot in slots] == pytest.approx([0.125, 0.375, 0.625, 0.875])
    assert [slot.words for slot in slots] == [("5",), ("6",), ("7",), ("8",)]
    known = found.information()
    assert known["position"].bits == pytest.approx(2) == known["position"].most
    assert known["token"].bits == pytest.approx(2)


def test_all_alike_say_nothing():
    labels = {"token": torch.arange(8), "position": torch.arange(8)}
    found, readers = tally(torch.full((4, 8), 1 / 8), labels, {"token": 8, "position": 8})
    assert set(readers.tolist()) == {0}  # of equals the first
    figures = found.figures()
    assert figures["js_divergence"] == pytest.approx(0, abs=1e-6)
    assert figures["read_entropy"] == pytest.approx(1)
    assert figures["read_width"] == pytest.approx(math.sqrt(1 / 12 - 1 / (12 * 64)))  # of an even spread
    assert all(each.bits == pytest.approx(0, abs=1e-6) for each in found.information().values())
    assert all(slot.words == () for slot in found.slots({i: "w" for i in range(8)}, torch.full((8,), 100)))


def test_a_map_by_hand():
    """Two concepts, three tokens; the second reads the last token twice as much as the first does."""
    weights = torch.tensor([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5]])
    found, readers = tally(weights)
    assert readers.tolist() == [0, 0, 1]
    # JS of (1/2, 1/2, 0) and (0, 1/2, 1/2): H(1/4, 1/2, 1/4) - 1 bit
    assert found.figures()["js_divergence"] == pytest.approx(0.5)
    entropy = -(2 / 3 * math.log(2 / 3) + math.log(1 / 3) / 3)
    assert found.figures()["usage_perplexity"] == pytest.approx(math.exp(entropy))
    assert found.figures()["centre_spread"] == pytest.approx(1 / 6)


def test_chance_is_the_floor_of_information():
    """Concepts that read one place of every text and know no words: with few texts the words seem to tell, and the
    shuffled texts seem to tell as much."""
    generator = torch.Generator().manual_seed(0)
    found = reads.Tally(8, {"token": 50})
    for _ in range(20):
        found.add(torch.eye(8), torch.eye(8), {"token": torch.randint(0, 50, (8,), generator=generator)})
    known = found.information()["token"]
    assert known.bits > 0.5
    assert known.bits == pytest.approx(known.floor, rel=0.15)


@pytest.mark.parametrize(
    ("piece", "kind"),
    [("  \n", "space"), (" --", "punctuation"), ("12", "number"), (" the", "common word"), (" Matrix", "name"),
     (" matrix", "word"), ("trix", "inside of a word")],
)  # fmt: skip
def test_simple_word_classes(piece, kind):
    assert reads.CLASSES[reads.class_of(piece)] == kind


def test_pieces_of_words_whoever_marks_them():
    from tokenizers import Tokenizer
    from tokenizers.models import WordPiece
    from transformers import PreTrainedTokenizerFast

    words = {"[UNK]": 0, "mat": 1, "##rix": 2, ",": 3}
    wordpiece = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordPiece(words, unk_token="[UNK]")))
    assert reads.pieces_of(wordpiece, [1, 2]) == {1: " mat", 2: "rix"}
    assert reads.pieces_of(Letters(), [7]) == {7: " w7"}


class OneText:
    """What ``reads`` asks of a loader."""

    def __init__(self, lengths, vocab_size=50):
        ids = np.random.default_rng(0).integers(2, vocab_size, sum(lengths))
        starts = np.cumsum([0, *lengths[:-1]])
        self.windows = Windows([Part(ids, starts, np.array(lengths, dtype=np.int32))])

    def evaluation_rows(self, max_tokens):
        return np.arange(len(self.windows))


class Letters:
    def decode(self, ids, clean_up_tokenization_spaces=False):
        return f" w{ids[0]}"


def build(**options):
    torch.manual_seed(0)
    shape = dict(vocab_size=50, hidden_size=16, num_concepts=4, num_hidden_layers=2, num_attention_heads=2,
                 intermediate_size=16)  # fmt: skip
    return ConceptEncoder(ConceptConfig(**{**shape, **options}))


@pytest.mark.parametrize("options", [{}, {"layer_kind": "slot", "tie_layers": True, "num_iterations": 3}])
def test_of_an_encoder(options):
    found = reads.reads(build(**options), OneText([12, 9, 30, 8, 8, 8, 8, 8]), Letters())
    assert len(found.layers) == options.get("num_iterations", 2)
    assert found.figures == found.layers[-1]
    assert 1 <= found.figures["usage_perplexity"] <= 4
    assert found.picture.weights.shape == (4, 12) and len(found.picture.pieces) == len(found.picture.readers) == 12
    assert sum(slot.usage for slot in found.slots) == pytest.approx(1)
    assert found.num_tokens == 91 and found.num_texts == 8


def test_anchored_concepts_read_where_they_stand():
    """An untrained encoder's concepts stand in order along the text, and so do the centres of what they read."""
    found = reads.reads(build(anchor_bias=6.0), OneText([40] * 8), Letters())
    centres = [slot.centre for slot in found.slots]
    assert centres == sorted(centres)
    assert found.information["position"].bits > 4 * found.information["position"].floor
    without = reads.reads(build(num_token_layers=1, funnel=[0]), OneText([40] * 8), Letters())
    assert without is None
