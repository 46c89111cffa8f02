"""The metrics of SCROLLS, in percent, with the keys of its evaluator.

Source: Shaham et al. 2022, arXiv:2201.03533; metrics of the dataset repository tau/scrolls, evaluator of
tau-nlp/scrolls at bfc0da0.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from ....engine.errors import InputError
from . import words

TASKS = ("gov_report", "summ_screen_fd", "qmsum", "narrative_qa", "qasper", "quality", "contract_nli")
DISPLAYED = ("rouge1", "rouge2", "rougeL")  # whose geometric mean is the score of a summary
CURLY = r"\u2018\u2019\u201c\u201d\xab\xbb"  # as NLTK's patterns write them
NO_LSUM = (
    "rouge/rougeLsum is left out: NLTK has no punkt_tab here (python -m nltk.downloader punkt_tab, or NLTK_DATA=FOLDER "
    "that holds tokenizers/punkt_tab); no score is made of it"
)
Values = dict[str, float]  # of one example
Score = dict[str, Any]  # of a task


def rouge(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Score, list[Values]]:
    """ROUGE-1, -2 and -L of every example, each the best over its references, and of the task: their means, and the
    geometric mean of the three.

    ROUGE-Lsum is shown beside them, as the evaluator does, where the sentence splitter that it needs has its data; it
    is no part of the score. Where it has not, it is left out, and one line says so.
    """
    split = sentence_splitter()
    kinds = (*DISPLAYED, "rougeLsum") if split else DISPLAYED
    scorer = rouge_scorer(kinds)
    rows: list[Values] = []
    for prediction, several in zip(predictions, references, strict=True):
        texts = [text if split is None else "\n".join(split(text)) for text in (prediction, *several)]
        best = scorer.score_multi(texts[1:], texts[0])
        rows.append({f"rouge/{kind}": 100 * best[kind].fmeasure for kind in kinds})
    score: Score = {key: fmean(row[key] for row in rows) for key in rows[0]}
    of_three = [f"rouge/{kind}" for kind in DISPLAYED]
    for values in (score, *rows):
        product = 1.0
        for key in of_three:
            product *= values[key]
        values["rouge/geometric_mean"] = values["scrolls_score"] = product ** (1 / 3)
    return closed(score, of_three), rows


def f1(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Score, list[Values]]:
    """F1 over words, the best over the references."""
    return compared("f1", words.f1, predictions, references)


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[Score, list[Values]]:
    """Equality of normalised texts with any of the references."""
    return compared("exact_match", words.exact_match, predictions, references)


def compared(
    key: str, metric: Callable[[str, str], float], predictions: Sequence[str], references: Sequence[Sequence[str]]
) -> tuple[Score, list[Values]]:
    values = [
        100 * max(metric(prediction, reference) for reference in several)
        for prediction, several in zip(predictions, references, strict=True)
    ]
    mean = fmean(values)
    return closed({key: mean, "scrolls_score": mean}, [key]), [{key: x, "scrolls_score": x} for x in values]


def closed(score: Score, displayed: list[str]) -> Score:
    """Rounded as the evaluator prints it, with the keys that a leaderboard shows."""
    rounded = {key: round(value, 4) for key, value in score.items()}
    return rounded | {"display_keys": displayed, "display": [rounded[key] for key in displayed]}


def benchmark(scores: Mapping[str, Score]) -> float:
    """The mean of ``scrolls_score`` over the seven tasks.

    Raises:
        InputError: one of them is missing.
    """
    missing = [task for task in TASKS if task not in scores]
    if missing:
        raise InputError(f"scrolls: the benchmark's score is of seven tasks, {', '.join(missing)} missing")
    return fmean(scores[task]["scrolls_score"] for task in TASKS)


def rouge_scorer(kinds: Sequence[str]) -> Any:
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise InputError("rouge-score is not installed; pip install 'conceptron[downstream]'") from error
    return RougeScorer(list(kinds), use_stemmer=False)


@cache
def sentence_splitter() -> Callable[[str], list[str]] | None:
    """NLTK's for English, as the evaluator's NLTK 3 splits; None, and a line on stderr, where its data are not found.

    NLTK 3.10 came to count curly quotes and guillemets as closing ones, which moves sentences and with them
    ROUGE-Lsum: they are taken out of its patterns again.
    """
    from nltk.data import find
    from nltk.tokenize.punkt import PunktLanguageVars, PunktSentenceTokenizer, load_punkt_params

    class Quotes(PunktLanguageVars):
        re_boundary_realignment = re.compile(
            PunktLanguageVars.re_boundary_realignment.pattern.replace(CURLY, ""), re.MULTILINE
        )

        @property
        def _re_non_word_chars(self) -> str:
            return super()._re_non_word_chars.replace(CURLY, "")

    try:
        params = load_punkt_params(find("tokenizers/punkt_tab/english/"))
    except LookupError:
        print(NO_LSUM, file=sys.stderr)
        return None
    return PunktSentenceTokenizer(params, lang_vars=Quotes()).tokenize
