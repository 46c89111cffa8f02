"""What is drawn can be read: names touch nothing, a curve has its axis to itself, the colour-blind tell lines apart."""

import itertools

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from conceptron.bench.documents.table import plot as plot_ablation
from conceptron.bench.figures import charts, curves, geometry, memory, plot
from conceptron.bench.measure.exponents import FROM_IDS, FULL, GROWING, OURS, PEERS, PHASES, SHARED, WITH_KEYS

MACHINE = {"cpu": "some cpu", "threads": 2, "width": 128, "layers": 3}
NAMES = (OURS, FROM_IDS, SHARED, WITH_KEYS, GROWING, *PEERS)


class Drawn:
    """What a figure really puts on the page."""

    def __init__(self):
        self.figure, self.boxes = None, {}

    @property
    def texts(self):
        return [(text.get_text(), box) for text, box in self.boxes.items()]


@pytest.fixture
def drawn(monkeypatch):
    found = Drawn()
    save, draw = Figure.savefig, Text.draw

    def remember(figure, *arguments, **options):
        found.boxes.clear()
        save(figure, *arguments, **options)
        figure.set_dpi(options["dpi"])  # in which the texts were measured
        found.figure = figure

    def note(text, renderer):
        draw(text, renderer)
        if text.get_visible() and text.get_text().strip():
            found.boxes[text] = text.get_window_extent(renderer)  # where it was drawn last: the layout draws too

    monkeypatch.setattr(Figure, "savefig", remember)
    monkeypatch.setattr(Text, "draw", note)
    monkeypatch.setattr(plot, "SUFFIXES", ("png",))
    return found


def check_page(drawn):
    """No text over another, over a bar or over the edge; every drawn line has a name."""
    page = drawn.figure.bbox
    for words, box in drawn.texts:
        assert box.x0 > page.x0 - 2 and box.x1 < page.x1 + 2 and box.y0 > page.y0 - 2 and box.y1 < page.y1 + 2, words
    for (a, first), (b, second) in itertools.combinations(drawn.texts, 2):
        assert not overlap(first, second), f"{a!r} lies on {b!r}"
    for axes in drawn.figure.axes:
        bars = [patch.get_window_extent() for patch in axes.patches if isinstance(patch, Rectangle)]
        for (words, box), bar in itertools.product(drawn.texts, bars):
            assert not overlap(box, bar), f"{words!r} lies on a bar"


def overlap(a, b, slack: float = 2.0) -> bool:
    return min(a.x1, b.x1) - max(a.x0, b.x0) > slack and min(a.y1, b.y1) - max(a.y0, b.y0) > slack


def share_of_axis(axes) -> float:
    """How much of the height the curves take."""
    values = np.concatenate([line.get_ydata() for line in axes.get_lines() if len(line.get_ydata()) > 2])
    low, high = axes.get_ylim()
    scale = np.log if axes.get_yscale() == "log" else np.asarray
    return float(np.ptp(scale(values)) / np.ptp(scale([low, high])))


def history(falls: float, steps: int = 400):
    noise = np.random.default_rng(0).normal(size=steps)
    loss = 5.6 + falls * np.exp(-np.arange(steps) / 30) + 0.05 * noise
    lines = [{"kind": "train", "step": i + 1, "loss": float(value)} for i, value in enumerate(loss)]
    return [*lines, {"kind": "eval", "step": 200, "nll_unseen": 5.8}, {"kind": "eval", "step": 400, "nll_unseen": 5.7}]


@pytest.mark.parametrize("falls", [0.3, 3.0])
def test_the_loss_has_its_axis_to_itself(drawn, tmp_path, falls):
    curves.loss_figure(history(falls), tmp_path / "loss.png", "a note", unigram_entropy=6.5, smoothing_floor=1.4)
    check_page(drawn)
    assert drawn.figure.axes[0].get_ylim()[0] > 5, "an axis from 0 would leave the curve in the top third"
    assert any("label smoothing" in words for words, _ in drawn.texts), "the floor is named, and does not set the axis"
    assert falls < 1 or share_of_axis(drawn.figure.axes[0]) > 0.8


@pytest.mark.parametrize("values", [(4.9, 5.2, 5.5, 5.9, 6.4, 6.6), (7.37, 7.37, 7.37, 7.36, 7.37, 7.37),
                                    (6.53, 6.54, 6.55, 6.56, 6.57, 6.60)])  # fmt: skip
def test_the_losses_by_share_hidden(drawn, tmp_path, values):
    by_view = {f"t={t:.2f}": value for t, value in zip((0.1, 0.3, 0.5, 0.7, 0.9, 1.0), values, strict=True)}
    curves.nll_figure(by_view, {"unigram entropy": 6.55, "unigram of training": 6.62}, tmp_path / "nll.png", "a note")
    check_page(drawn)
    assert sum(words == f"{values[0]:.2f}" for words, _ in drawn.texts) == 1 + values[1:].count(values[0])
    assert drawn.figure.axes[0].get_ylim()[0] > 4


@pytest.mark.parametrize("kind", ["alike", "apart"])
def test_figures_of_the_concepts(drawn, tmp_path, kind):
    z = torch.randn(8, 12, 16, generator=torch.Generator().manual_seed(0)) + (3 if kind == "alike" else 0)
    geometry.similarity_figure(z, tmp_path / "similarity.png")
    check_page(drawn)
    geometry.spectrum_figure(z, tmp_path / "spectrum.png")
    check_page(drawn)
    assert share_of_axis(drawn.figure.axes[0]) > 0.7
    assert any(words.startswith("all directions alike: 8.33 %") for words, _ in drawn.texts), "the dotted line"


def growth(names=NAMES, lengths=(512, 2048, 8192, 32768)):
    rows = []
    for i, name in enumerate(names):
        for phase, n in itertools.product(PHASES, lengths):
            power = 2 if name == FULL else 1
            ran = name != FULL or n < 32768
            rows.append({"encoder": name, "phase": phase, "N": n, "C": 128,
                         "time_ms": (1 + i / 5) * (n / 256) ** power if ran else None,
                         "peak_bytes": (1 + i / 3) * 1e5 * (n / 256) ** power if ran else None,
                         "status": "measured" if ran else "not run"})  # fmt: skip
    return rows


@pytest.mark.parametrize("draw", [
    lambda path, rows: charts.plot_growth(path, rows, "time_ms", charts.note_of(MACHINE)),
    lambda path, rows: charts.plot_growth(path, rows, "peak_bytes", charts.note_of(MACHINE)),
    lambda path, rows: charts.plot_speedup(path, rows, charts.note_of(MACHINE)),
    lambda path, rows: charts.plot_overview(path, rows, charts.note_of(MACHINE)),
])  # fmt: skip
def test_growth_of_every_encoder(drawn, tmp_path, draw):
    draw(tmp_path / "x.png", growth())
    check_page(drawn)
    for axes in drawn.figure.axes:
        named = [line.get_label() for line in axes.get_lines() if len(line.get_xdata()) > 2]
        assert named and not any(label.startswith("_") for label in named)


def test_the_overview_goes_on_where_the_short_lengths_end(tmp_path, monkeypatch):
    from conceptron.bench.measure.results import write_results

    seen = []
    monkeypatch.setattr(charts, "plot_overview", lambda path, rows, note: seen.append(rows))
    write_results(tmp_path / "a", "scaling", growth(lengths=(512, 1024)), MACHINE)
    write_results(tmp_path / "b", "scaling", growth(lengths=(1024, 4096)), MACHINE)
    write_results(tmp_path / "c", "scaling", growth(lengths=(4096,)), MACHINE | {"width": 64})
    for other in "bc":
        charts.draw_overview(tmp_path, tmp_path / "a" / "scaling.json", tmp_path / other / "scaling.json")
    assert [sorted({row["N"] for row in rows}) for rows in seen] == [[512, 1024, 4096], [512, 1024]]
    keys = [(row["encoder"], row["phase"], row["N"]) for row in seen[0]]
    assert len(keys) == len(set(keys))


def test_figures_of_memory(drawn, tmp_path):
    parts = {"parameters": 2**23, "gradients": 2**23, "optimizer": 2**24, "activations: embedding": 2**22,
             "activations: encoder": 2**25, "temporary": 2**26}  # fmt: skip
    rows = [{"encoder": name, "N": n, "C": c, **parts, "allocator_peak": n * 2**15, "resident_peak": n * 2**18}
            for name, c in ((OURS, 128), (OURS, 512), (FULL, None)) for n in (512, 1024, 2048)]  # fmt: skip
    memory.plot_memory(tmp_path / "memory.png", rows, "one text of N tokens")
    check_page(drawn)
    rows = [{"encoder": name, "N": n, "bytes_per_token": 60.0 * 4**i + n / 1000}
            for i, name in enumerate((FROM_IDS, OURS, SHARED, WITH_KEYS)) for n in (16384, 65536)]  # fmt: skip
    memory.plot_encoders(tmp_path / "encoders.png", rows, "two texts")
    check_page(drawn)


def test_figures_of_operators(drawn, tmp_path):
    rows = [{"operator": operator, "case": "c", "mode": mode, "provider": "conceptron", "tflops": 0.1 + i / 50,
             "gb_s": 2.0} for i, operator in enumerate(("a", "b")) for mode in ("forward", "both")]  # fmt: skip
    charts.plot_roofline(tmp_path / "r.png", rows, MACHINE | {"copy_gb_s": 30.0, "matmul_tflops": 0.2})
    check_page(drawn)
    for ratios in ((0.98, 1.09, 0.78), (0.2, 30.0), (1.0,)):
        best = [{"operator": "concept_attention", "case": "B2-N2048-C128-H4-D64-ragged", "best peer": "torch.compile",
                 "ours is faster by": ratio} for ratio in ratios]  # fmt: skip
        charts.plot_best(tmp_path / "b.png", best, MACHINE)
        check_page(drawn)


def test_figure_of_an_ablation(drawn, tmp_path):
    figures = {"heldout_nll": 6.1, "accuracy_deleted": 0.05, "retrieval_pooled": 0.2, "rank_dynamic": 20.0}
    cells = [{"row": name, "against": None, "change": "-", "seed": seed, "status": "measured", "unigram_entropy": 6.2,
              "chance": 0.01, **{key: value * (1 + seed / 9) for key, value in figures.items()}}
             for name in ("first", "second", "contrastive") for seed in (0, 1)]  # fmt: skip
    plot_ablation(tmp_path / "a.png", cells, MACHINE)
    check_page(drawn)


def test_every_figure_is_written_twice(tmp_path):
    with plot.canvas(tmp_path / "x.png", "title", "note") as (axes,):
        axes.plot([1, 2], [3, 4])
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG") and b"<svg" in (tmp_path / "x.svg").read_bytes()


# Machado, Oliveira and Fernandes 2009, full strength, on linear RGB
SIGHTS = {
    "full": np.eye(3),
    "without red cones": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                          [-0.003882, -0.048116, 1.051998]],
    "without green cones": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                            [-0.011820, 0.042940, 0.968881]],
    "without blue cones": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                           [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
                   [0.0193339, 0.1191920, 0.9503041]])  # fmt: skip


def linear(colour: str) -> np.ndarray:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* of linear RGB, under D65."""
    x, y, z = np.cbrt(TO_XYZ @ np.clip(rgb, 1e-3, 1) / [0.95047, 1, 1.08883])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHTS)
def test_the_colour_blind_tell_the_lines_apart(sight):
    seen = {colour: lab(np.array(SIGHTS[sight]) @ linear(colour)) for colour in plot.SERIES}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 20, (a, b)
    for colour in plot.SERIES:  # and from white: WCAG's contrast for graphics
        assert 1.05 / (TO_XYZ[1] @ linear(colour) + 0.05) > 3, colour


def test_lines_of_one_colour_differ_in_marker_and_stroke():
    looks = [charts.line_of(name, NAMES) for name in NAMES]
    assert len({look["marker"] for look in looks}) == len(looks)
    strokes = [(look["color"], str(look["linestyle"])) for look in looks]
    assert len(set(strokes)) == len(strokes)
    variants = [charts.line_of(f"v{i}", [f"v{i}" for i in range(9)]) for i in range(9)]
    assert len({(look["color"], str(look["linestyle"])) for look in variants}) == 9
