"""Metrics of labels and of values: GLUE, PAWS, SICK, BoolQ. Fractions, not percent, as GLUE's own evaluator.

Source: the metric "glue" of huggingface/evaluate; scikit-learn and scipy compute.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.stats import pearsonr, spearmanr

Score = dict[str, Any]


def accuracy(predictions: Sequence[int], labels: Sequence[int]) -> Score:
    return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(labels)))}


def accuracy_f1(predictions: Sequence[int], labels: Sequence[int]) -> Score:
    """With F1 of the class 1; 0 where nothing is it."""
    from sklearn.metrics import f1_score

    return accuracy(predictions, labels) | {"f1": float(f1_score(labels, predictions, zero_division=0.0))}


def matthews(predictions: Sequence[int], labels: Sequence[int]) -> Score:
    """Of CoLA; 0 where one side is constant."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews_correlation": float(matthews_corrcoef(labels, predictions))}


def correlation(predictions: Sequence[float], labels: Sequence[float]) -> Score:
    """Pearson and Spearman; nan where one side is constant."""
    a, b = np.asarray(predictions, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    if np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"pearson": float("nan"), "spearmanr": float("nan")}
    return {"pearson": float(pearsonr(a, b).statistic), "spearmanr": float(spearmanr(a, b).statistic)}


def relatedness(predictions: Sequence[float], labels: Sequence[float]) -> Score:
    """Of SICK: Pearson is the official one."""
    found = correlation(predictions, labels)
    error = float(np.mean((np.asarray(predictions, dtype=np.float64) - np.asarray(labels, dtype=np.float64)) ** 2))
    return {"pearson": found["pearson"], "spearman": found["spearmanr"], "mse": error}


def paraphrase(predictions: Sequence[float], labels: Sequence[int]) -> Score:
    """Of PAWS: accuracy at 0.5 and the area under the curve of precision over recall, as steps (average precision) and
    as trapezoids."""
    from sklearn.metrics import auc, average_precision_score, precision_recall_curve

    scores, truth = np.asarray(predictions, dtype=np.float64), np.asarray(labels)
    precision, recall, _ = precision_recall_curve(truth, scores)
    return {
        "accuracy": float(np.mean((scores >= 0.5) == truth)), "average_precision": float(
            average_precision_score(truth, scores)), "pr_auc": float(auc(recall, precision)),
    }  # fmt: skip
