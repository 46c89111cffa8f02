"""Heads of tasks: what they compute, what they load, what they refuse."""

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
)

from conceptron.engine.saved_model import load_model
from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.layers import ZeroLinear
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.packing import Packed, pack
from conceptron.models.tasks.heads import (
    ConceptForMultipleChoice,
    ConceptForQuestionAnswering,
    ConceptForSequenceClassification,
    class_loss,
    span_loss,
)
from conceptron.models.tasks.pooling import mean_of_rows

SMALL = dict(
    vocab_size=60, hidden_size=32, num_concepts=6, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
    num_decoder_layers=1, mask_token_id=3, pad_token_id=0, num_labels=3,
)  # fmt: skip
CONCEPT_POOLS = ("mean", "weighted", "attention", "cls_query", "multi_query")
POOLS = [
    *({"pool": kind} for kind in CONCEPT_POOLS),
    {"pool": "decoder"},
    {"pool": "decoder_positions", "decoder_queries": "position"},
]
PAIRS = [{"pair": "separate", "pair_features": kind} for kind in ("concat", "cosine", "slots")]
HEADS = [
    *((ConceptForSequenceClassification, options) for options in POOLS),
    *((ConceptForMultipleChoice, options) for options in (POOLS[0], POOLS[5])),
    (ConceptForQuestionAnswering, {}),
    (ConceptForQuestionAnswering, {"timestep_conditioning": True}),
]
NAMES = [f"{kind.__name__[10:]}-{'-'.join(map(str, options.values()))}" for kind, options in HEADS]


def opened(model: torch.nn.Module) -> torch.nn.Module:
    """float64, and nothing at zero, so that every parameter matters."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ZeroLinear):
                module.weight.normal_(std=0.3)
                if module.bias is not None:
                    module.bias.normal_(std=0.3)
    return model.double().eval()


def model(kind=ConceptForSequenceClassification, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    if options.get("pair_features") == "cosine":
        options = {**options, "num_labels": 1}
    return opened(kind(ConceptConfig(**{**SMALL, **options})))


def texts(*lengths: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(4, 60, (n,), generator=generator) for n in lengths]


def padded(rows: list[torch.Tensor], width: int, left: int = 0) -> dict[str, torch.Tensor]:
    ids, mask = torch.full((len(rows), width), 17), torch.zeros(len(rows), width, dtype=torch.int64)
    for row, text in enumerate(rows):
        ids[row, left : left + len(text)], mask[row, left : left + len(text)] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def inputs(kind, options) -> dict:
    """A packed batch of four texts (one empty), with labels."""
    batch = {"packed": pack(texts(9, 0, 14, 3))}
    if kind is ConceptForQuestionAnswering:
        return {**batch, "start_positions": torch.tensor([2, 0, 5, 1]), "end_positions": torch.tensor([4, 0, 5, 2])}
    if kind is ConceptForMultipleChoice:
        return {**batch, "num_choices": 2, "labels": torch.tensor([1, 0])}
    if options.get("pair") == "separate":
        batch["packed_b"] = pack(texts(5, 7, 2, 11, seed=2))
    return {**batch, "labels": torch.tensor([2, 0, 1, 1]) if options.get("num_labels") != 1 else torch.rand(4)}


def answers(out) -> torch.Tensor:
    return out.start_logits + 2 * out.end_logits if "start_logits" in out else out.logits


# --- what they compute


def test_problem_types_are_those_of_transformers():
    packed, values = pack(texts(9, 5)), torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, 1.0]])
    classes, flags = torch.tensor([2, 0]), torch.tensor([[1, 0, 1], [0, 0, 1]]).float()
    built = model()
    logits = built(packed=packed).logits
    cases = [
        ({}, classes, F.cross_entropy(logits, classes)),
        ({}, flags, F.binary_cross_entropy_with_logits(logits, flags.double())),
        ({"problem_type": "regression"}, values, F.mse_loss(logits, values.double())),
        ({"problem_type": "multi_label_classification"}, flags.long(),
         F.binary_cross_entropy_with_logits(logits, flags.double())),
        ({"problem_type": "single_label_classification"}, classes.int()[:, None], F.cross_entropy(logits, classes)),
    ]  # fmt: skip
    for options, labels, expected in cases:
        assert torch.allclose(model(**options)(packed=packed, labels=labels).loss, expected), options
    assert torch.allclose(
        built(packed=packed, labels=torch.tensor([-100, 1])).loss, F.cross_entropy(logits[1:], torch.tensor([1]))
    )
    assert built(packed=packed, labels=torch.tensor([-100, -100])).loss == 0


def test_a_regression_starts_at_the_mean_and_keeps_its_shape():
    """STS-B style: labels [B] of 0 to 5. Values come out in the labels' unit, the loss is in standard deviations."""
    labels = torch.tensor([0.5, 4.0, 2.5, 5.0])
    options = dict(num_labels=1, label_offset=float(labels.mean()), label_scale=float(labels.std(correction=0)))
    torch.manual_seed(0)
    fresh = ConceptForSequenceClassification(ConceptConfig(**{**SMALL, **options}))
    out = fresh(packed=pack(texts(9, 5, 3, 12)), labels=labels)
    assert out.logits.shape == (4, 1) and torch.allclose(out.logits, labels.mean().expand(4, 1))
    assert out.loss.item() == pytest.approx(1.0, abs=1e-6)  # the variance of z-scores
    built = model(**options)
    single = built(packed=pack(texts(9)), labels=labels[:1])
    assert single.logits.shape == (1, 1) and single.loss.ndim == 0
    z = (labels[:1].double() - options["label_offset"]) / options["label_scale"]
    x = (single.logits - options["label_offset"]) / options["label_scale"]
    assert torch.allclose(single.loss, (x[0] - z).square().mean())
    assert torch.allclose(built(packed=pack(texts(9)), labels=labels[:1, None]).loss, single.loss)


def test_pair_features_written_out():
    a, b = pack(texts(9, 0, 14)), pack(texts(5, 7, 2, seed=2))
    for options in PAIRS:
        built = model(**options, label_offset=0.5, label_scale=4.0)
        u, v = (built.encoder(packed=packed).last_hidden_state for packed in (a, b))
        if options["pair_features"] == "concat":
            p, q = built.norm(u.mean(1)), built.norm(v.mean(1))
            expected = built.classifier(torch.cat((p, q, (p - q).abs(), p * q), -1))
        elif options["pair_features"] == "cosine":
            expected = 0.5 + 4.0 * F.cosine_similarity(u.mean(1), v.mean(1))[:, None]
            assert built.classifier is None and built.norm is None
            assert {name.split(".")[0] for name, _ in built.named_parameters()} == {"encoder"}
        else:
            expected = built.classifier(F.cosine_similarity(u, v, dim=-1))
        out = built(packed=a, packed_b=b).logits
        assert torch.allclose(out, expected, atol=1e-6), options
        swapped = built(packed=b, packed_b=a).logits
        assert torch.allclose(swapped, out, atol=1e-9) == (options["pair_features"] != "concat")
    same = model(**PAIRS[1], label_scale=5.0)(packed=a, packed_b=a).logits
    assert torch.allclose(same, torch.full((3, 1), 5.0, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize("kind, options", HEADS, ids=NAMES)
def test_padded_equals_packed_and_texts_do_not_meet(kind, options):
    built, rows = model(kind, **options), texts(9, 14, 3, 6)
    extra = {"num_choices": 2} if kind is ConceptForMultipleChoice else {}
    whole = answers(built(packed=pack(rows), **extra))
    given = padded(rows, width=20, left=3)
    if kind is ConceptForMultipleChoice:
        given = {name: x.view(2, 2, -1) for name, x in given.items()}
        halves = [answers(built(packed=pack(rows[i : i + 2]), **extra)) for i in (0, 2)]
    else:
        halves = [answers(built(packed=pack([row]))) for row in rows]
    assert torch.allclose(torch.cat(halves), whole, atol=1e-9)
    loose = answers(built(**given))
    if kind is ConceptForQuestionAnswering:
        mask = given["attention_mask"] != 0
        assert loose.shape == mask.shape and (loose[~mask] < -1e300).all()
        loose = loose[mask]
    assert torch.allclose(loose, whole, atol=1e-9)


def test_a_decoder_pool_is_the_mean_of_its_rows():
    """And a decoder with timesteps is told that a clean text is clean, or that positions alone show nothing of it."""
    for options, time in ((POOLS[5], 1e-3), (POOLS[6], 1)):
        built, packed = model(timestep_conditioning=True, **options), pack(texts(9, 4))
        encoded = built.encoder(packed=packed)
        rows = built.decoder(
            encoded.last_hidden_state, encoded.anchors, packed.position_ids, packed.cu_seqlens, 9,
            input_ids=packed.input_ids, timesteps=torch.full((2,), time),
        )  # fmt: skip
        pooled = torch.stack((rows[:9].mean(0), rows[9:].mean(0)))
        assert torch.allclose(built(packed=packed).logits, built.classifier(built.norm(pooled)), atol=1e-9)


def test_multiple_choice_is_a_softmax_over_the_choices():
    built, packed = model(ConceptForMultipleChoice), pack(texts(9, 5, 3, 12, 8, 7))
    scores = built.classifier(built.norm(built.encoder(packed=packed).last_hidden_state.mean(1))).view(2, 3)
    out = built(packed=packed, num_choices=3, labels=torch.tensor([2, 0]))
    assert torch.allclose(out.logits, scores, atol=1e-9)
    assert torch.allclose(out.loss, F.cross_entropy(scores, torch.tensor([2, 0])))


def test_spans_are_softmaxes_over_each_text():
    """Packed and padded, with what is outside a text not asked."""
    built, rows = model(ConceptForQuestionAnswering), texts(9, 4, 1)
    packed, starts, ends = pack(rows), torch.tensor([3, 7, 0]), torch.tensor([8, 2, -100])
    out = built(packed=packed, start_positions=starts, end_positions=ends)
    spans = zip(out.start_logits.split([9, 4, 1]), out.end_logits.split([9, 4, 1]), starts, ends, strict=True)
    asked = [
        F.cross_entropy(scores, at)
        for start_scores, end_scores, start, end in spans
        for scores, at in ((start_scores, start), (end_scores, end))
        if 0 <= at < len(scores)
    ]
    assert len(asked) == 4 and torch.allclose(out.loss, torch.stack(asked).mean())
    given = padded(rows, width=12, left=2)
    columns = [torch.tensor([2 + 3, 2 + 7, 2]), torch.tensor([2 + 8, 2 + 2, 90])]
    loose = built(**given, start_positions=columns[0], end_positions=columns[1])
    assert torch.allclose(loose.loss, out.loss)
    bare = built(given["input_ids"], start_positions=columns[0], end_positions=columns[0])
    assert torch.allclose(bare.loss, (F.cross_entropy(bare.start_logits, columns[0])
                                      + F.cross_entropy(bare.end_logits, columns[0])) / 2)  # fmt: skip
    nothing = built(packed=packed, start_positions=ends - 500, end_positions=ends - 500)
    nothing.loss.backward()
    assert nothing.loss == 0 and built.qa_outputs.weight.grad.abs().max() == 0
    assert built(packed=pack([[], []]), start_positions=starts[:2], end_positions=starts[:2]).loss == 0


@pytest.mark.parametrize("kind, options", [*HEADS, *((ConceptForSequenceClassification, pair) for pair in PAIRS)])
def test_every_parameter_gets_a_finite_gradient_inside_its_own_module(kind, options):
    """None is dead weight; and ZeRO-3 gathers a module's weights around that module's forward only."""
    if options.get("pair_features") == "cosine":
        options = {**options, "num_labels": 1}
    built, given = model(kind, **options), inputs(kind, options)
    loss = built(**given).loss
    loss.backward()
    got = {name: p.grad for name, p in built.named_parameters()}
    assert [name for name, grad in got.items() if grad is None or not grad.abs().max() > 0] == []
    assert all(grad.isfinite().all() for grad in got.values())
    whole = {parameter: parameter.data for parameter in built.parameters()}

    def gather(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter]

    def release(module, *_):
        for parameter in module.parameters(recurse=False):
            parameter.data = whole[parameter].new_empty(0)

    for module in built.modules():
        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(module)
    with torch.no_grad():
        assert float(built(**given).loss) == pytest.approx(loss.item(), rel=1e-12)


def test_parameters_equal_their_closed_form():
    d, L, C, V = 32, 3, 6, 60
    encoder = ConceptEncoder(ConceptConfig(**SMALL)).num_parameters()
    decoder = ConceptForMaskedLM(ConceptConfig(**SMALL)).num_parameters() - encoder - V  # tied tables, and the bias
    assert model().num_parameters() == encoder + d + d * L + L
    assert model(pool="decoder").num_parameters() == encoder + decoder + d + d * L + L  # its table is the encoder's
    assert model(**PAIRS[0]).num_parameters() == encoder + d + 4 * d * L + L
    assert model(**PAIRS[1]).num_parameters() == encoder
    assert model(**PAIRS[2]).num_parameters() == encoder + C * L + L
    assert model(ConceptForMultipleChoice).num_parameters() == encoder + d + d
    assert model(ConceptForQuestionAnswering).num_parameters() == encoder + decoder + 2 * d


@pytest.mark.parametrize("kind, options", [HEADS[0], HEADS[4], HEADS[5], HEADS[7], HEADS[9],
                                           (ConceptForSequenceClassification, PAIRS[0])])  # fmt: skip
def test_autocast_gives_about_the_same(kind, options):
    built, given = model(kind, **options).float(), inputs(kind, options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = built(**given)
    high = built(**given)
    assert low.loss.dtype == torch.float32 and torch.allclose(low.loss, high.loss, atol=0.1)
    assert (answers(low).float() - answers(high)).abs().max() < 0.3


def test_what_heads_add_is_one_graph_without_a_look_back():
    """fullgraph: nothing is read back from the device. One graph for all lengths. The rest is ConceptForMaskedLM's."""
    pool = model(pool="multi_query").float().pool

    def head(rows: torch.Tensor, concepts: torch.Tensor, packed: Packed, spans: torch.Tensor) -> torch.Tensor:
        pooled = pool(concepts) + mean_of_rows(rows, packed.cu_seqlens)
        return class_loss(pooled, spans[:, 0]) + span_loss(rows[:, :2], packed, spans)

    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    compiled = torch.compile(head, fullgraph=True, backend="eager", dynamic=True)
    spans = torch.tensor([[1, 5], [0, 0], [2, 8]])
    for lengths in ((20, 9, 7), (11, 0, 30)):
        packed = pack(texts(*lengths))
        given = torch.randn(packed.num_tokens, 32), torch.randn(3, 6, 32), packed, spans
        assert torch.allclose(compiled(*given), head(*given), rtol=1e-5)
    assert counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


# --- what they load


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A masked language model and the folder it was saved in, for each kind of decoder queries."""
    saved = {}
    for queries in ("token+position", "position"):
        torch.manual_seed(3)
        built = ConceptForMaskedLM(ConceptConfig(**{**SMALL, "decoder_queries": queries})).eval()
        folder = tmp_path_factory.mktemp("pretrained")
        built.save_pretrained(folder)
        saved[queries] = built, folder
    return saved


@pytest.mark.parametrize("options", POOLS, ids=lambda options: options["pool"])
def test_a_masked_language_model_gives_its_encoder_and_decoder(pretrained, options):
    source, folder = pretrained[options.get("decoder_queries", "token+position")]
    built = AutoModelForSequenceClassification.from_pretrained(folder, pool=options["pool"], num_labels=1)
    assert type(built) is ConceptForSequenceClassification and built.config.num_labels == 1
    parts = ["encoder", "decoder"] if options["pool"].startswith("decoder") else ["encoder"]
    theirs = dict(source.named_parameters())
    for name, parameter in built.named_parameters():
        assert name.split(".")[0] not in parts or torch.equal(parameter, theirs[name]), name
    report = built.load_report
    assert set(report.loaded) | set(report.new) == {name for name, _ in built.named_parameters()}
    assert set(report.new) == {n for n, _ in built.named_parameters() if n.split(".")[0] not in parts}
    assert "lm_head.bias" in report.unused and ("decoder" in parts) == (built.decoder is not None)
    assert f"{len(report.new)} new (classifier.bias" in str(report) and "\n" not in str(report)
    if built.decoder is not None and built.decoder.embed_tokens is not None:
        assert built.decoder.embed_tokens.weight is built.encoder.embed_tokens.weight


def test_queries_of_a_decoder_can_change_for_a_task(pretrained):
    built = ConceptForSequenceClassification.from_pretrained(
        pretrained["token+position"][1], pool="decoder_positions", decoder_queries="position"
    )
    assert "decoder.query.embedding.weight" in built.load_report.new
    assert "decoder.norms.0.norm.weight" in built.load_report.loaded


def test_weights_that_must_come_from_the_checkpoint_do_or_it_is_refused(pretrained, tmp_path):
    source, folder = pretrained["token+position"]
    with pytest.raises(ValueError, match=r"weights that ConceptForSequenceClassification reads .* encoder\.layers\.1"):
        ConceptForSequenceClassification.from_pretrained(folder, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.feed"):
        ConceptForMultipleChoice.from_pretrained(folder, intermediate_size=64, ignore_mismatched_sizes=True)
    source.encoder.save_pretrained(tmp_path)
    built = ConceptForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(built.encoder.embed_tokens.weight, source.encoder.embed_tokens.weight)
    assert set(built.load_report.new) == {"norm.weight", "classifier.weight", "classifier.bias"}
    with pytest.raises(ValueError, match=r"decoder\.branches"):
        ConceptForQuestionAnswering.from_pretrained(tmp_path)


def test_slots_follow_another_number_of_concepts(pretrained, tmp_path):
    """From a masked language model, and from a head that was trained: cosines keep their part of the text."""
    fresh = ConceptForSequenceClassification.from_pretrained(pretrained["position"][1], num_concepts=12, **PAIRS[2])
    assert fresh.classifier.weight.shape == (3, 12) and "classifier.weight" in fresh.load_report.new
    model(**PAIRS[2]).float().save_pretrained(tmp_path)
    saved = ConceptForSequenceClassification.from_pretrained(tmp_path).classifier.weight
    wide = ConceptForSequenceClassification.from_pretrained(tmp_path, num_concepts=18).classifier.weight
    assert wide.shape == (3, 18) and torch.allclose(wide[:, 1::3], saved, atol=1e-6)


@pytest.mark.parametrize("kind, options", [*HEADS, *((ConceptForSequenceClassification, pair) for pair in PAIRS)])
def test_saved_and_loaded_bit_for_bit(kind, options, tmp_path):
    built, given = model(kind, **options).float(), inputs(kind, options)
    given.pop("labels", None)
    built.save_pretrained(tmp_path)
    auto = {
        ConceptForSequenceClassification: AutoModelForSequenceClassification,
        ConceptForMultipleChoice: AutoModelForMultipleChoice,
        ConceptForQuestionAnswering: AutoModelForQuestionAnswering,
    }[kind]
    for loaded in (auto.from_pretrained(tmp_path), load_model(tmp_path)):
        assert type(loaded) is kind and loaded.load_report.new == () and loaded.load_report.unused == ()
        assert torch.equal(answers(loaded(**given)), answers(built(**given)))


# --- what is refused


@pytest.mark.parametrize("options, words", [
    ({"pool": "decoder", "decoder_queries": "position"}, "pool: expected .*decoder_positions, with decoder_queries"),
    ({"pool": "decoder_positions"}, "pool: expected .*decoder, with decoder_queries = token"),
    ({**PAIRS[2], "pool": "weighted"}, "pool: expected mean with pair_features = slots"),
    ({"label_scale": 0.0}, r"label_scale: expected a number in \[1e-30, 1e\+30\], got 0.0"),
    ({"label_offset": "mean"}, "label_offset: expected a number"),
])  # fmt: skip
def test_configurations_that_do_not_fit_are_refused(options, words, pretrained):
    with pytest.raises(ValueError, match=words):
        ConceptConfig(**options)
    with pytest.raises(ValueError, match=words):  # also where transformers sets them after the check
        ConceptForSequenceClassification.from_pretrained(pretrained["token+position"][1], **options)


def test_calls_that_do_not_fit_are_refused():
    two, three = pack(texts(4, 5)), pack(texts(4, 5, 6))
    single, pair, choice = model(), model(**PAIRS[0]), model(ConceptForMultipleChoice)
    spans, one = model(ConceptForQuestionAnswering), torch.tensor([0])
    for call, words in (
        (lambda: single(), "input_ids: expected either input_ids or packed"),
        (lambda: single(packed=two, packed_b=two), "config.pair is 'joint'"),
        (lambda: single(packed=two, labels=torch.tensor([1])), r"labels: expected shape \[2\], got \[1\]"),
        (lambda: single(packed=two, labels=torch.rand(2, 2)), r"labels: expected shape \[2, 3\], got \[2, 2\]"),
        (lambda: single(packed=two, ablate="noise"), "ablate: expected 'zero', 'shuffle' or None, got 'noise'"),
        (lambda: single(packed=pack(texts(4)), ablate="shuffle"), "needs two texts in a batch"),
        (lambda: pair(packed=two), "input_ids_b: expected either input_ids_b or packed_b"),
        (lambda: pair(packed=two, packed_b=three), "input_ids_b: expected 2 texts"),
        (lambda: choice(packed=three, num_choices=2), "num_choices: expected a divisor of the 3 packed texts, got 2"),
        (lambda: choice(packed=three), "num_choices"),
        (lambda: choice(two.input_ids[None]), r"input_ids: expected shape \[B, K, N\]"),
        (lambda: choice(packed=two, num_choices=2, ablate="shuffle"), "needs two texts"),
        (lambda: spans(packed=two, start_positions=one), "both start_positions and end_positions"),
        (lambda: spans(packed=two, start_positions=one, end_positions=one), r"start_positions: expected shape \[2\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            call()
    with pytest.raises(ValueError, match="num_labels: expected 1 with pair_features = cosine"):
        ConceptForSequenceClassification(ConceptConfig(**{**SMALL, **PAIRS[1]}))
