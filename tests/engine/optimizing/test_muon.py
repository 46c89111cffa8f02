"""Muon for matrices: which they are, its norms beside DeepSpeed's, and that runs resume."""

import json

import pytest
import torch

from conceptron.engine import compat
from conceptron.engine.checkpoints import checkpoint
from conceptron.engine.checkpoints.checkpoint import Progress
from conceptron.engine.checkpoints.writer import save
from conceptron.engine.optimizing import muon
from conceptron.engine.optimizing.optimizer import build_optimizer, parameter_groups
from conceptron.engine.recipe.schema import Optim
from conceptron.engine.trainer import train
from conceptron.models.config import ConceptConfig
from conceptron.models.masked_lm import ConceptForMaskedLM

STAGES = pytest.mark.parametrize("stage, precision", [(1, "fp32"), (2, "bf16"), (3, "fp32")])


def test_matrices_of_layers_only():
    shape = dict(vocab_size=50, hidden_size=16, num_concepts=3, num_attention_heads=2, intermediate_size=8)
    net = ConceptForMaskedLM(ConceptConfig(**shape, mask_token_id=1, tie_word_embeddings=False))
    optimizer = build_optimizer(net, Optim(muon={}, lr=1e-3, weight_decay=0.1))
    found = {id(p) for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    names = {name for name, parameter in net.named_parameters() if id(parameter) in found}
    assert all(name.startswith(("encoder.layers.", "decoder.branches.")) for name in names)
    assert {"encoder.layers.0.feed.down.weight", "decoder.branches.0.query.project.weight"} <= names
    apart = {"encoder.embed_tokens.weight", "lm_head.weight", "encoder.concepts.weight"}
    assert apart <= {name for name, _ in net.named_parameters()} - names
    members = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(members) == sorted(id(p) for p in net.parameters())
    assert optimizer.param_groups[0]["lr_ratio"] == pytest.approx(20)


def test_an_update_is_orthogonal_and_decays_apart(build, steps):
    """One step with lr 1: singular values of what a matrix moved by are about 1, as many as its gradient has."""
    engine = build(lr=1e-3, weight_decay=0.0, muon={"lr": 1.0})
    matrix = engine.module.encoder.layers[0].feed.down.weight
    before = matrix.detach().clone()
    steps(engine, 0, 1)
    for group in engine.optimizer.param_groups:
        assert group["lr"] == (1.0 if group["use_muon"] else 1e-3)
    moved = torch.linalg.svdvals((matrix - before).detach().double())
    assert moved.max() < 1.3 and (moved > 0.6).sum() >= 8  # five steps of Newton and Schulz are not exact


@STAGES
def test_norms_are_of_the_gradient_and_clip_what_adamw_takes(world, build, steps, stage, precision, monkeypatch):
    plain = build(stage, precision, clip=0.0)
    ((_, whole),) = steps(plain, 0, 1)
    found, lengths = [], []
    for largest in (0.0, 0.25):
        engine = build(stage, precision, clip=largest, eps=100.0, lr=100.0, weight_decay=0.0, muon={})
        adam = [p for group in parameter_groups(engine.module, 0) for p in group["params"] if not p.use_muon]
        before, step = [compat.whole(p) for p in adam], engine.step

        def clipped_step(step=step, engine=engine):
            found.append({name: float(norm) for name, norm in muon.clip(engine, world).items()})
            step()

        monkeypatch.setattr(engine, "step", clipped_step)
        steps(engine, 0, 1)
        moved = [compat.whole(p).double() - b.double() for p, b in zip(adam, before, strict=True)]
        lengths.append(float(torch.stack([m.norm() for m in moved]).norm()))
    assert found[0] == pytest.approx(found[1])
    assert found[0]["grad_norm"] == pytest.approx(whole, rel=1e-4)
    rest = found[0]["grad_norm_rest"]
    assert 0.3 < rest < whole and rest**2 + found[0]["grad_norm_matrices"] ** 2 == pytest.approx(whole**2, rel=1e-4)
    # AdamW with an eps of 100 moves by about lr / 100 * gradient
    assert lengths[0] == pytest.approx(rest, rel=0.05) and lengths[1] == pytest.approx(0.25, rel=0.05)


def test_resumes_bitwise(world, build, steps, tmp_path):
    """At other stages, on two ranks: test_resume.py."""
    given = dict(lr=1e-3, muon={"lr": 0.02})
    straight = steps(build(**given), 0, 4)
    engine = build(**given)
    steps(engine, 0, 2)
    folder = save(world, tmp_path, engine, Progress(step=2, optimizer_steps=2), keep_last=1)
    assert checkpoint.has(folder, checkpoint.MOMENTUM) and checkpoint.has(folder, checkpoint.MOMENTS[0])
    assert steps(build(found=folder, **given), 2, 4) == straight[2:]


def test_a_step_that_is_skipped_leaves_the_momentum_alone(build, steps):
    engine = build(muon={})
    steps(engine, 0, 1)
    (group,) = [i for i, is_muon in enumerate(compat.muon_groups(engine)) if is_muon]
    flat = engine.optimizer.single_partition_of_fp32_groups[group]
    before = engine.optimizer.optimizer.state[flat]["momentum_buffer"].clone()
    engine.module.decoder.norms[0].norm.weight.register_hook(lambda g: g * float("nan"))
    weights = flat.detach().clone()
    steps(engine, 1, 2)
    assert not engine.was_step_applied()
    assert torch.equal(engine.optimizer.optimizer.state[flat]["momentum_buffer"], before)
    assert torch.equal(flat.detach(), weights)


def test_a_run_logs_both_norms_and_learns(recipe):
    folder = train(recipe, ["optim.muon={lr: 0.02}", "eval.every=0"])
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [entry for entry in entries if entry["kind"] == "train"]
    for entry in steps:
        whole, rest, matrices = (entry[f"grad_norm{of}"] for of in ("", "_rest", "_matrices"))
        assert rest > 0 and whole**2 == pytest.approx(rest**2 + matrices**2)
        parts = entry["grad_norms"].values()  # of embeddings, encoder, decoder
        assert len(parts) > 2 and sum(norm**2 for norm in parts) == pytest.approx(whole**2, rel=1e-4)
    assert steps[-1]["loss"] < 0.9 * steps[0]["loss"]
