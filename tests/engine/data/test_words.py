"""Where words begin, for the kinds of tokenizer that tell it, against a reading of the text itself."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from conceptron.engine.data.tokenizer import describe, train
from conceptron.engine.data.windows import cut_sentences
from conceptron.engine.data.words import byte_characters, sentence_ends, word_edges
from conceptron.models.objectives.view import ENDS_WORD, OPENS_WORD, SampleKey, clean_text
from conceptron.models.objectives.words import word_starts
from conceptron.models.packing import pack

TEXT = "Readers (of unreadable words) don't stop;\n\tsnake_case antidisestablishment x=3.14 naïve cafés, twice..."
SPECIAL = {"unk_token": "[UNK]", "mask_token": "[MASK]"}


def byte_level() -> PreTrainedTokenizerFast:
    return train([TEXT] * 3, vocab_size=300)


def wordpiece() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=110, special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def metaspace() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=list(SPECIAL.values()), show_progress=False)
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


@pytest.mark.parametrize("make", [byte_level, wordpiece, metaspace])
def test_words_begin_where_the_text_says(make):
    """At every first letter of a run of letters and digits (or the space before it), and at everything else."""
    vocabulary = describe(make(), "made up")
    tokens = vocabulary.tokens._replace(word_edges=word_edges(vocabulary.tokenizer, vocabulary.tokens.vocab_size))
    assert len(tokens.word_edges) == tokens.vocab_size
    encoding = vocabulary.plain.encode(TEXT, add_special_tokens=False)
    starts = word_starts(clean_text(pack([encoding.ids]), [SampleKey(0, 0, 0)], tokens), tokens)
    inside = np.zeros(len(TEXT), dtype=bool)  # does a run of letters and digits go on at this character?
    for run in re.finditer(r"[^\W_]+", TEXT):
        inside[run.start() + 1 : run.end()] = True
    num_inside = 0
    for (begin, end), token, found in zip(encoding.offsets, encoding.tokens, starts, strict=True):
        assert found == (not inside[begin]), (token, TEXT[begin:end])  # the two bytes of an ï are one letter too
        num_inside += not found
    assert num_inside > 5


def test_entries_that_join_words_open_and_end():
    tokenizer = byte_level()
    tokenizer.add_tokens(["   ", "a  "])
    edges = word_edges(tokenizer, len(tokenizer))
    by_text = {text: edges[tokenizer.convert_tokens_to_ids(text)] for text in ("   ", "a  ", "a", "Ġ", "(", "Ċ")}
    both = OPENS_WORD | ENDS_WORD
    assert by_text == {"   ": both, "a  ": ENDS_WORD, "a": 0, "Ġ": both, "(": both, "Ċ": both}


def test_byte_characters_are_those_of_the_tokenizers_library():
    assert sorted(byte_characters().values()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert byte_characters()[ord(" ")] == "Ġ" and byte_characters()[ord("a")] == "a"


def test_a_vocabulary_that_does_not_tell():
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "[MASK]": 1, "a": 2}, unk_token="[UNK]"))
    assert word_edges(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL), 3) is None


def test_sentences_by_hand():
    words = byte_level()
    ends = sentence_ends(words, len(words))
    closing = {words.decode([i]) for i in np.flatnonzero(ends)}
    assert {".", "!", "?", "\n"} <= closing and not any(each.strip() in ("a", ",", "the") for each in closing)
    closes = np.arange(10) == 9  # token 9 closes
    tokens = np.array([1] * 7 + [9] + [2, 9] + [3] * 15 + [4] * 6 + [9])
    offsets = np.array([0, 25, 32])
    starts, lengths = cut_sentences(tokens, offsets, np.array([0, 1]), 10, closes)
    # eight tokens; two are too few; fifteen without an end are cut after ten, and five are left out; seven
    assert list(zip(starts.tolist(), lengths.tolist(), strict=True)) == [(0, 8), (10, 10), (25, 7)]
