"""The layer with one thing changed, against float64 token loops; and the experiment that trains with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import Case, assert_close, gradients, make_inputs, relative_error
from pages import assert_drawn, rows_of
from torch import Tensor
from transformers import DynamicCache

from experiments.evidence import ablations, command
from experiments.evidence.record import Record
from experiments.evidence.variants import Variant, changed_kalmanet, with_variant
from gka.hf import GKAConfig, GKAForCausalLM
from gka.ops import gated_kalmanet, reference
from gka.ops.solvers import Chebyshev, ConjugateGradient

CASES = (
    Case(lengths=(37, 37), H=4, Hk=2, D=12, V=12, state=False, normalize_qk=True),
    Case(lengths=(33,), H=3, Hk=3, D=7, V=7, alpha=False, state=False, normalize_qk=True),
    Case(lengths=(1,), H=2, Hk=1, D=5, V=5, beta=False, state=False, normalize_qk=True),
)
CONJUGATE = Variant(solver="conjugate gradient")
CONVERGED = (150,)


def leaves_of(case: Case, seed: int = 0) -> dict[str, Tensor]:
    found = make_inputs(case, seed=seed)
    return {name: found[name] for name in ("q", "k", "v", "g", "alpha", "beta") if found[name] is not None}


def outcome(leaves: dict[str, Tensor], function: Any, **options: Any) -> dict[str, Tensor]:
    """o and all gradients."""
    named = ("q", "k", "v", "g", "alpha", "beta")
    sketch = {"sketch": leaves["sketch"]} if "sketch" in leaves else {}
    o = function(*(leaves.get(name) for name in named), **sketch, **options)
    return {"o": o, **gradients({"o": o}, leaves)}


def changed(leaves: dict[str, Tensor], variant: Variant, **options: Any) -> dict[str, Tensor]:
    return outcome(leaves, lambda *inputs, **more: changed_kalmanet(*inputs, variant, **more, **options))


def token_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    alpha: Tensor | None,
    beta: Tensor | None,
    *,
    ridge: float | None = None,
    sketch: Tensor | None = None,
) -> Tensor:
    """The definition, token by token; exact solves, gradients through all of them by autograd."""
    B, T, H, D = q.shape
    q, k = (x / (x.norm(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    k, v = (x.repeat_interleave(H // x.shape[2], dim=2) for x in (k, v))
    if beta is not None:
        k, v = k * beta.unsqueeze(-1), v * beta.unsqueeze(-1)
    P = torch.eye(D, dtype=q.dtype).expand(H, D, D)
    if sketch is not None:
        P = sketch.repeat_interleave(H // sketch.shape[0], dim=0)
    S_kk, S_kv = q.new_zeros(B, H, P.shape[1], P.shape[1]), q.new_zeros(B, H, D, v.shape[-1])
    identity = torch.eye(P.shape[1], dtype=q.dtype)
    outputs = []
    for t in range(T):
        key = torch.einsum("hsd,bhd->bhs", P, k[:, t])
        fade = g[:, t].exp()[..., None, None]
        S_kk = fade * S_kk + key.unsqueeze(-1) * key.unsqueeze(-2)
        S_kv = fade * S_kv + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        strength = 0.02 * S_kk.square().sum((-1, -2)).sqrt() if ridge is None else q.new_full((B, H), ridge)
        A = S_kk + strength[..., None, None] * identity
        x = torch.linalg.solve(A, torch.einsum("hsd,bhd->bhs", P, q[:, t]))
        x = torch.einsum("hsd,bhs->bhd", P, x)
        y = x if alpha is None else q[:, t] + alpha[:, t].unsqueeze(-1) * (x - q[:, t])
        outputs.append(torch.einsum("bhd,bhdv->bhv", y, S_kv) * D**-0.5)
    return torch.stack(outputs, dim=1)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("solver_steps", [(31,), (7, 6)], ids=str)
def test_without_a_change_it_is_the_layers_op(case: Case, solver_steps: tuple[int, ...]) -> None:
    leaves = leaves_of(case)
    ref = outcome(
        leaves, lambda *x: gated_kalmanet(*x, normalize_qk=True, ridge_ratio=0.05, solver_steps=solver_steps)[0]
    )
    for chunk_size in (None, 5):
        assert_close(
            changed(leaves, Variant(), ridge_ratio=0.05, solver_steps=solver_steps, chunk_size=chunk_size),
            ref,
            1e-11,
        )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("ridge", [0.25, 2.0])
def test_constant_ridge(case: Case, ridge: float) -> None:
    leaves = leaves_of(case)
    ref = outcome(leaves, lambda *x: token_loop(*x, ridge=ridge))
    assert_close(changed(leaves, Variant(ridge=ridge), solver_steps=CONVERGED, chunk_size=8), ref, 1e-9)
    assert_close(changed(leaves, Variant(ridge=ridge), solver_steps=(60, 40), chunk_size=8), ref, 1e-7)


def test_constant_ridge_cut_short_is_chebyshev_iteration() -> None:
    """Each token's polynomial is that of `Chebyshev` with a = lambda / ||S||."""
    leaves = leaves_of(Case(lengths=(12,), H=2, Hk=2, D=6, V=6, alpha=False, beta=False, state=False))
    q, k, v, g = (leaves[name].detach() for name in ("q", "k", "v", "g"))
    out = changed_kalmanet(q, k, v, g, None, None, Variant(ridge=0.25), solver_steps=(4, 3), chunk_size=5)
    q, k = (x / (x.norm(dim=-1, keepdim=True) + 1e-6) for x in (q, k))
    for head in range(2):
        S_kk, S_kv = torch.zeros(2, 6, 6, dtype=torch.float64)
        for t in range(12):
            S_kk, S_kv = (
                g[0, t, head].exp() * S + torch.outer(k[0, t, head], right[0, t, head])
                for S, right in ((S_kk, k), (S_kv, v))
            )
            norm = S_kk.norm()
            x = Chebyshev((4, 3)).solve(S_kk / norm, q[0, t, head] / norm, 0.25 / norm.item())
            assert relative_error(out[0, t, head], (x @ S_kv) * 6**-0.5) < 1e-11


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("d", [3, 5])
def test_sketch(case: Case, d: int) -> None:
    generator = torch.Generator().manual_seed(d)
    P = torch.randn(case.Hk, d, case.D, generator=generator, dtype=torch.float64)
    leaves = {**leaves_of(case), "sketch": P.requires_grad_()}
    ref = outcome(leaves, token_loop)
    assert_close(changed(leaves, Variant(sketch=d), solver_steps=CONVERGED, chunk_size=8), ref, 1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_conjugate_gradient(case: Case) -> None:
    """As many products as asked for, and its own adjoint solve; with more than D of them it is exact."""
    leaves = leaves_of(case)
    short = outcome(
        leaves,
        lambda *x: reference.gated_kalmanet(
            *x, ridge_ratio=0.02, solver_steps=None, scale=case.D**-0.5, initial_state=None,
            output_final_state=False, cu_seqlens=None, normalize_qk=True, solver=ConjugateGradient((4,)),
        )[0],
    )  # fmt: skip
    assert_close(changed(leaves, CONJUGATE, solver_steps=(3, 3), chunk_size=8), short, 1e-10)
    exact = outcome(leaves, token_loop)
    assert_close(changed(leaves, CONJUGATE, solver_steps=(31,), chunk_size=8), exact, 1e-8)
    if case.lengths[0] > 1:
        assert relative_error(short["o"], exact["o"]) > 1e-3, "cut short too late to tell"


@pytest.mark.parametrize("variant", [Variant(ridge=0.25), Variant(sketch=8), CONJUGATE], ids=str)
def test_products_in_bfloat16_and_in_float32(variant: Variant) -> None:
    """Refined, bfloat16 products cost no more than o's rounding; conjugate gradient is not refined."""
    case = Case(lengths=(70,), H=2, Hk=2, D=16, V=16, state=False, normalize_qk=True)
    leaves = {
        name: x.detach().bfloat16() if name in "qkv" else x.detach().float() for name, x in leaves_of(case).items()
    }
    exact = {name: x.double() for name, x in leaves.items()}
    if variant.sketch is not None:
        P = torch.linalg.qr(torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))).Q.mT
        leaves["sketch"], exact["sketch"] = P, P.double()
    inputs = [exact.get(name) for name in ("q", "k", "v", "g", "alpha", "beta")]
    ref = token_loop(*inputs, ridge=variant.ridge, sketch=exact.get("sketch"))  # type: ignore[arg-type]
    arguments = [leaves[name] for name in ("q", "k", "v", "g", "alpha", "beta")]

    def error(wide: bool) -> float:
        chosen = Variant(variant.ridge, variant.sketch, variant.solver, wide)
        out = changed_kalmanet(*arguments, chosen, sketch=leaves.get("sketch"), chunk_size=32)
        assert out.dtype == torch.bfloat16
        return relative_error(out, ref)

    assert error(True) < 3e-3
    assert error(False) < 3e-3 if variant.solver == "Chebyshev" else error(False) > 1.2 * error(True)


@pytest.mark.parametrize("variant", [Variant(), Variant(ridge=0.25), CONJUGATE], ids=str)
def test_a_past_without_keys(variant: Variant) -> None:
    """Where S_kk is zero nothing is read and nothing is NaN."""
    leaves = leaves_of(CASES[0])
    with torch.no_grad():
        leaves["k"][:, :6] = 0.0
        leaves["g"][:, 3] = -torch.inf
    found = changed(leaves, variant, chunk_size=4)
    assert all(x.isfinite().all() for x in found.values())
    assert not found["o"][:, :6].any() and found["o"][:, 6:].any() and not found["dq"][:, :6].any()


def small_model(**fields: Any) -> GKAForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return GKAForCausalLM(GKAConfig(vocab_size=50, use_cache=False, **sizes, **fields))


IDS = torch.randint(3, 50, (2, 40), generator=torch.Generator().manual_seed(0))


def test_a_model_without_a_change_is_the_model() -> None:
    """Nor does a sketch change it that has as many dims as a head, before it learns."""
    model = small_model(num_key_value_heads=1).double()
    ref = model(IDS, labels=IDS)
    for variant in (Variant(), Variant(sketch=16)):
        out = with_variant(small_model(num_key_value_heads=1), variant).double()(IDS, labels=IDS)
        assert relative_error(out.logits, ref.logits) < 1e-5, variant


@pytest.mark.parametrize("variant", [Variant(ridge=0.25), Variant(sketch=4), CONJUGATE], ids=str)
def test_a_model_with_a_change_learns_and_leaves_pads_alone(variant: Variant) -> None:
    base = small_model(solver_steps=[4, 4])(IDS).logits
    model = with_variant(small_model(solver_steps=[4, 4]), variant)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert sum("sketch" in name for name, _ in model.named_parameters()) == (2 if variant.sketch else 0)
    out = model(IDS).logits
    assert relative_error(out, base) > 1e-3, "nothing is changed"
    padded = torch.cat([torch.zeros(2, 7, dtype=torch.long), IDS], dim=1)
    masked = model(padded, attention_mask=(padded > 0).long()).logits
    assert relative_error(masked[:, 7:], out) < 1e-5


def test_what_a_changed_model_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="no layer with mixer"):
        with_variant(small_model(mixer="gla"), Variant(ridge=0.25))
    with pytest.raises(ValueError, match="sketch is 17; expected at most the head dim, 16"):
        with_variant(small_model(), Variant(sketch=17))
    for wrong, message in (
        ({"ridge": 0.0}, "ridge is 0.0"),
        ({"sketch": 0}, "sketch is 0"),
        ({"solver": "conjugate"}, "solver is 'conjugate'"),
        ({"ridge": 0.25, "solver": "conjugate gradient"}, "expected None with conjugate gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            Variant(**wrong)
    model = with_variant(small_model(), CONJUGATE)
    with pytest.raises(ValueError, match="neither a cache nor packed sequences"):
        model(IDS, past_key_values=DynamicCache(config=model.config), use_cache=True)


# The experiment


def test_the_first_seed_of_all_comes_first_and_nothing_else_differs() -> None:
    full = ablations.cells("full")
    names = list(ablations.TRIALS)
    assert [cell["variant"] for cell in full] == 3 * names and names[0] == ablations.BASE
    assert [cell["seed"] for cell in full] == [seed for seed in (0, 1, 2) for _ in names]
    in_pytorch = [trial.change is not None for trial in ablations.TRIALS.values()]
    assert in_pytorch == sorted(in_pytorch)
    rest = [{k: v for k, v in cell.items() if k not in ("variant", "seed", "dtype")} for cell in full]
    assert all(cell == rest[0] for cell in rest)


def test_models_differ_in_what_their_name_says() -> None:
    cell = {**ablations.cells("full")[0], "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1}
    models = {name: ablations.build({**cell, "variant": name}, 50, 0) for name in ablations.TRIALS}
    layers = {name: model.model.layers[0].gka for name, model in models.items()}
    assert layers["no forget gate"].a_proj is None and layers["no alpha connection"].alpha_proj is None
    assert layers["no beta gate"].b_proj is None and layers[ablations.BASE].b_proj is not None
    assert layers["alpha starts at 0.88"].alpha_proj.bias.item() == 2.0
    assert layers["alpha starts at 0.12"].alpha_proj.bias.item() == -2.0
    assert layers["first weights 0.02"].q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for a in (0.01, 0.05, 0.1):
        assert layers[f"a = {a:g}"].ridge_ratio == a
    assert layers[ablations.BASE].ridge_ratio == 0.02 and layers[ablations.BASE].solver_steps is None
    for solver_steps in ((31,), (16, 8), (8,)):
        assert layers[f"steps {solver_steps}"].solver_steps == solver_steps
    for d in (16, 32, 64):
        assert layers[f"sketch, d = {d}"].sketch.shape == (1, d, 64)
    assert layers["lambda = 0.25"].variant == Variant(ridge=0.25)
    assert layers["conjugate gradient"].variant == CONJUGATE
    same = models[ablations.BASE].state_dict()
    for name, part in (("alpha starts at 0.88", "alpha_proj.bias"), ("A starts 10 times smaller", "A_log"),
                       ("dt starts 10 times smaller", "dt_bias")):  # fmt: skip
        other = models[name].state_dict()
        changed = [key for key, value in same.items() if not torch.equal(other[key], value)]
        assert len(changed) == 4 and all(key.endswith(part) for key in changed)
    for name in ("lambda = 0.25", "conjugate gradient", "steps (8,)", "sketch, d = 16"):
        other = models[name].state_dict()
        assert all(torch.equal(other[key], value) for key, value in same.items()), name


def test_spikes_stand_out_of_the_steps_before() -> None:
    falling: list[float | None] = [10.0 / (n + 1) for n in range(60)]
    assert ablations.spikes(falling) == []
    falling[3] = 100.0  # too early to tell
    falling[20] = 3.5 * 10.0 / 5
    falling[40] = None
    assert ablations.spikes(falling) == [21, 41]
    assert ablations.spikes([]) == ablations.spikes([1.0]) == []


def test_a_training_and_its_page(tmp_path: Path) -> None:
    """One with an option of the layer, one changed; losses and norms of every step."""
    text = tmp_path / "text.py"
    generator = torch.Generator().manual_seed(0)
    words = [f"word{n}" for n in torch.randint(40, (3000,), generator=generator).tolist()]
    text.write_text(" ".join(words) + "\n")
    for name in (ablations.BASE, "sketch, d = 16"):
        command.measure("ablations", "small", tmp_path / "out", [f"variant={name}"], "cpu", data=[str(text)])
    entries = Record(tmp_path / "out/ablations.json", "ablations").entries
    base, sketch = (entry["result"] for entry in entries)
    for result in (base, sketch):
        assert len(result["gradient norms"]) == 3 and min(result["gradient norms"]) > 0
        assert result["train loss"][-1][0] == 3 and result["held out"]["recall_tokens"] > 0
        assert result["diverged"] is None and result["spikes"] == []
    assert sketch["parameters"] == base["parameters"] + 16 * 32
    page = ablations.section(entries, tmp_path / "it.png")
    beside = sketch["held out"]["loss"] - base["held out"]["loss"]
    rows = {row[0]: row for row in rows_of(page)}
    assert rows[ablations.BASE][1:3] == [f"{base['held out']['loss']:.4f}", ""]
    assert rows["sketch, d = 16"][2] == f"{beside:+.4f}"
    assert_drawn(tmp_path / "it.png")


def test_the_page_says_what_is_more_than_chance_and_what_diverged(tmp_path: Path) -> None:
    losses = {
        ablations.BASE: (3.0, 3.1), "a = 0.01": (3.2, 3.15), "a = 0.1": (2.97, 3.07), "steps (8,)": (3.02, 3.09),
        "steps (16, 8)": (3.04, 3.08), "lambda = 0.25": (2.9, None), "sketch, d = 16": (3.01, 3.08),
        "sketch, d = 32": (3.02, 3.14),
        "float32, steps (31,)": (2.97, 3.09),
    }  # fmt: skip
    cells = {(cell["variant"], cell["seed"]): cell for cell in ablations.cells("full")}
    entries = []
    for name, by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            held_out = {"loss": loss, "recall_loss": 1.0, "tokens": 10, "recall_tokens": 2}
            result = {
                "train loss": [[10, 4.0], [20, 3.5]],
                "gradient norms": [1.0, 2.0 + seed, None if loss is None else 1.5],
                "spikes": [7] if name == "lambda = 0.25" else [],
                "diverged": 20 if loss is None else None,
                "held out": None if loss is None else held_out,
            }
            entries.append({"cell": cells[name, seed], "result": result})
    page = ablations.section(entries, tmp_path / "it.png")
    findings = " ".join(line for line in page.splitlines() if not line.startswith("|"))
    alike, *groups = (
        '"steps (16, 8)", "float32, steps (31,)"',  # how much their losses differ is chance
        '"a = 0.01", "lambda = 0.25"',  # worse by more than any of these
        '"sketch, d = 32"',  # worse by more than their medians alone
        '"a = 0.1"',  # better so
        '"steps (8,)", "sketch, d = 16"',  # no more than chance
    )
    places = [findings.index(group, findings.index(alike)) for group in groups]
    assert places == sorted(places)
    for number in ("0.040", "0.020", "+0.0200 (+0.0100 to +0.0300)"):
        assert number in findings
    assert '2 with "lambda = 0.25"' in findings, "spikes of the gradient norm"
    rows = {row[0]: row for row in rows_of(page)}
    assert rows["a = 0.01"][1:3] == ["3.1750 (3.1500 to 3.2000)", "+0.1250 (+0.0500 to +0.2000)"]
    assert rows["lambda = 0.25"][1:3] == 2 * ["not finite in 1 of 2"]
    assert rows["lambda = 0.25"][-3:] == ["1.750 (1.500 to 2.000)", "2.5 (2 to 3)", "2"]
