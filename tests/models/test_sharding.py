"""Two and four devices that each hold a part of every text give what one gives, and send the same whatever N is."""

import functools
import multiprocessing
import traceback

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conceptron.models.config import ConceptConfig
from conceptron.models.encoder import ConceptEncoder
from conceptron.models.masked_lm import ConceptForMaskedLM
from conceptron.models.objectives import OBJECTIVES, SampleKey, SpecialTokens
from conceptron.models.packing import pack
from conceptron.models.pretraining import Pretraining, Totals
from conceptron.models.regularizers import Regularization
from conceptron.models.sharding import shard, shard_view

VOCAB, C, D = 60, 6, 16  # ids, concepts, width
LENGTHS = [37, 5, 0, 1, 64]
MODELS = {
    "segment": {},
    "shared keys": {"share_kv": 2, "init_queries": "orthogonal"},
    "tied": {"tie_layers": True, "num_iterations": 3},
    "window": {"num_token_layers": 2, "token_window": 4},
    "convolution": {"num_token_layers": 2, "token_mixer": "conv", "normalize_tokens": True},
    "learned places": {"token_positions": "learned", "concept_positions": "learned", "max_position_embeddings": 64},
}


TOKENS = SpecialTokens(mask_id=1, special_ids=frozenset({0, 1}), vocab_size=VOCAB)
TRAININGS = {  # objective, fields of the model, of the regularisation
    "random targets": ({"name": "mlm"}, {"num_token_layers": 1, "token_window": 4}, {}),
    "timesteps": ({"name": "diffusion", "hidden": "mask"}, {"timestep_conditioning": True}, {}),
    "targets at the end": ({"name": "prefix_diffusion", "direction": "forward"}, {"condition_dropout": 0.5}, {}),
    "deleted": ({"name": "tsdae"}, {"tie_layers": True, "num_iterations": 3, "backprop_iterations": 2}, {}),
    "read back": ({"name": "read_back"}, {"decoder_queries": "token+position"}, {"terms": ("orthogonality",)}),
    "capped": ({"name": "mlm"}, {"nested_concepts": True}, {"terms": ("t_regs", "variance"), "weight": 9.0}),
}


def configure(fields: dict) -> ConceptConfig:
    torch.manual_seed(0)
    return ConceptConfig(
        vocab_size=VOCAB, hidden_size=D, num_concepts=C, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, num_decoder_layers=1, mask_token_id=1, **fields,
    )  # fmt: skip


def build(fields: dict) -> ConceptEncoder:
    return ConceptEncoder(configure(fields)).double()


def texts(lengths=LENGTHS):
    generator = np.random.default_rng(0)
    return pack([generator.integers(1, VOCAB, n) for n in lengths])


def weighing(rank: int, size: int) -> torch.Tensor:
    """What the loss of one device makes of the concepts; over all devices they differ."""
    generator = torch.Generator().manual_seed(size * 10 + rank)
    return torch.randn(len(LENGTHS), C, D, generator=generator, dtype=torch.float64)


def compare(rank: int, size: int, group) -> None:
    for name, fields in MODELS.items():
        one, many = build(fields), build(fields)
        loss = sum((one(packed=texts()).last_hidden_state * weighing(r, size)).sum() for r in range(size))
        loss.backward()
        many.group = group
        output = many(packed=shard(texts(), rank, size, many.config))
        expected = one(packed=texts())
        told = functools.partial("{}: {}".format, name)
        torch.testing.assert_close(output.last_hidden_state, expected.last_hidden_state, msg=told)
        assert torch.equal(output.anchors, expected.anchors)
        (output.last_hidden_state * weighing(rank, size)).sum().backward()
        for (part, p), q in zip(many.named_parameters(), one.parameters(), strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(gradient, group=group)
            told = functools.partial("{} {}: {}".format, name, part)
            torch.testing.assert_close(gradient, q.grad, rtol=1e-9, atol=1e-9, msg=told)


def train(rank: int, size: int, num_shards: int, group) -> None:
    """A step over ``size`` ranks in groups that share texts: its loss, figures and gradients are those of one rank.

    Two micro-batches a group, as in ``engine/update.py``; gradients are averaged over all ranks, as DeepSpeed does.
    """
    num_groups = size // num_shards
    lengths = [[37, 5, 0], [1, 64], [2], [20, 3]] if num_groups == 2 else [[37, 5, 0, 1], [64]]
    for name, (options, fields, terms) in TRAININGS.items():
        objective = OBJECTIVES[options["name"]](**{key: options[key] for key in options if key != "name"})
        generator = np.random.default_rng(7)
        batches = [pack([generator.integers(2, VOCAB, n) for n in each]) for each in lengths]
        keys = [[SampleKey(0, i, j) for j in range(len(each))] for i, each in enumerate(lengths)]
        views = [objective.view(batch, of, TOKENS) for batch, of in zip(batches, keys, strict=True)]

        def step(module, mine, totals, seeds):
            losses = {}
            for view, seed in zip(mine, seeds, strict=True):
                torch.manual_seed(seed)
                output = module(view, totals=totals, step=9, smoothing=0.1)
                output.loss.backward()
                for key, value in output.figures.items():
                    losses[key] = losses.get(key, 0) + value.double()
                losses["cap"] = losses.get("cap", 0) + (module.cap_scale or 0)
            return losses

        def of(fields=fields, terms=terms):
            options = Regularization(warmup_steps=0, **terms) if terms else None
            return Pretraining(ConceptForMaskedLM(configure(fields)), None, options).double().train()

        one, many = of(), of()
        expected = step(one, views, Totals.of(views), range(len(views)))
        many.share_texts(group)
        which = range(rank // num_shards, len(views), num_groups)
        parts = [shard_view(views[i], rank % num_shards, num_shards, many.model.config) for i in which]

        def over_ranks(sums):
            dist.all_reduce(sums)
            return sums

        found = step(many, parts, Totals.of(parts, over_ranks, size), which)
        for key in found:
            value = over_ranks(torch.as_tensor(found[key], dtype=torch.float64) / size)
            ratio = num_groups if key == "cap" else 1  # each group has its own micro-batches, not a share of all
            told = functools.partial("{} {}: {}".format, name, key)
            torch.testing.assert_close(ratio * value, torch.as_tensor(expected[key]).double(), msg=told)
        for (part, p), q in zip(many.named_parameters(), one.parameters(), strict=True):
            gradient = over_ranks(torch.zeros_like(p) if p.grad is None else p.grad) / size
            told = functools.partial("{} {}: {}".format, name, part)
            wanted = torch.zeros_like(q) if q.grad is None else q.grad
            # divisors are float32, as everywhere in training: their rounding is all that differs
            torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9, msg=told)
        assert (expected["cap"] > 0) == bool(terms) and float(expected["task"]) > 1


def count_bytes(rank: int, size: int, group) -> None:
    sent = []
    real = dist.all_gather, dist.all_reduce

    def all_gather(parts, x, **options):
        sent.append(x.nbytes)
        return real[0](parts, x, **options)

    def all_reduce(x, **options):
        sent.append(x.nbytes)
        return real[1](x, **options)

    dist.all_gather, dist.all_reduce = all_gather, all_reduce
    model, totals = Pretraining(ConceptForMaskedLM(configure({}))).double().train(), []
    objective = OBJECTIVES["tsdae"]()
    model.share_texts(group)
    for num_tokens in (1024, 16384):
        whole = objective.view(texts([num_tokens]), [SampleKey(0, 0, 0)], TOKENS)
        part = shard_view(whole, rank, size, model.model.config)
        assert abs(part.encoder.num_tokens - whole.encoder.num_tokens / size) < 1
        assert abs(part.num_targets - whole.num_targets / size) < 1 and whole.num_targets > num_tokens / 2
        sent.clear()
        model(part).loss.backward()
        totals.append(sum(sent))
    dist.all_gather, dist.all_reduce = real
    rows = C * D * 8  # of one text, float64
    lse = C * 2 * 8
    start = 2 * rows + C * 8  # segment sums forward and backward, and how many tokens each has
    assert totals == [2 * (2 * rows + lse) + start] * 2, totals


def run(rank: int, size: int, folder: str, errors) -> None:
    try:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size)
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        compare(rank, size, dist.group.WORLD)
        compare(rank % 2, 2, pairs[rank // 2])
        train(rank, size, 4, dist.group.WORLD)
        train(rank, size, 2, pairs[rank // 2])
        count_bytes(rank, size, dist.group.WORLD)
        dist.destroy_process_group()
    except BaseException:
        errors.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise


def test_devices_that_share_texts_are_one(tmp_path):
    size, context = 4, multiprocessing.get_context("fork")
    errors = context.SimpleQueue()
    ranks = [context.Process(target=run, args=(rank, size, str(tmp_path), errors)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
    for process in ranks:
        if process.is_alive():
            process.kill()
    assert errors.empty(), errors.get()
    assert [process.exitcode for process in ranks] == [0] * size


@pytest.mark.parametrize(
    "fields", [{"layer_kind": "bixt"}, {"layer_kind": "slot"}, {"num_token_layers": 2, "funnel": [0]}]
)
def test_what_cannot_be_sharded_is_named(fields):
    with pytest.raises(ValueError, match=f"{'funnel' if 'funnel' in fields else 'layer_kind'}: .* several devices"):
        shard(texts(), 0, 2, build(fields).config)
    with pytest.raises(ValueError, match="rank: expected 0 to 1, got 2"):
        shard(texts(), 2, 2, build({}).config)


def test_every_token_has_one_owner_and_its_neighbours():
    config = build(MODELS["window"]).config
    parts = [shard(texts(), rank, 3, config) for rank in range(3)]
    owned = torch.cat([part.input_ids[part.own] for part in parts])
    assert torch.equal(owned.sort().values, texts().input_ids.sort().values)
    middle = parts[1]
    last = middle.sequence_ids() == len(LENGTHS) - 1
    assert middle.position_ids[last].tolist() == list(range(21 - 8, 42 + 8))
    assert torch.equal(middle.num_positions(), torch.tensor(LENGTHS))
