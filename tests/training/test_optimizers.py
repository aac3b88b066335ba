"""Optimizers: ScaledAdam against its formulas in plain Python, AdamW and Muon against torch, and what all promise."""

import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load, save
from torch import Tensor, nn

from longwave.errors import UserError
from longwave.layers.head import Head, TiedHead
from longwave.layers.linear import Linear
from longwave.training.optimizers import (
    AdamWConfig,
    MuonConfig,
    Optimizer,
    OptimizerConfig,
    ScaledAdam,
    ScaledAdamConfig,
    trainable_weights,
)

Config = ScaledAdamConfig | AdamWConfig | MuonConfig
ALL: list[Config] = [
    ScaledAdamConfig(),
    ScaledAdamConfig(clipping="icefall"),
    AdamWConfig(lr=0.01),
    MuonConfig(lr=0.01),
    MuonConfig(lr=0.02, adamw_lr=0.003, adjust_lr_fn="original", nesterov=False),
]
every = pytest.mark.parametrize("config", ALL, ids=lambda config: config.kind)


class Bag(nn.Module):
    """Parameters by name, and nothing else."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


class Net(nn.Module):
    """A model with matrices, vectors, a scalar, and same-shaped tensors."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.norm = nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.tensor(0.7))
        self.to(dtype)

    def forward(self, inputs: Tensor) -> Tensor:
        for layer in self.layers:
            inputs = torch.tanh(layer(inputs))
        return self.norm(inputs) * self.gain


def set_gradients(model: nn.Module, seed: int, size: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = (size * noise).to(parameter.dtype)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Real losses, with an occasional outlier so that clipping has something to do."""
    dtype = next(model.parameters()).dtype
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(4, 6, generator=generator).to(dtype)
        (model(inputs) - inputs.flip(0)).square().sum().mul(50.0 if step % 7 == 6 else 1.0).backward()
        optimizer.step(1.0 / (1 + step))
        optimizer.zero_grad()


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype
        assert torch.equal(left[name], right[name]), name


def snapshot(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    state = model.state_dict() | {f"optimizer.{name}": tensor for name, tensor in optimizer.tensors().items()}
    return {name: tensor.detach().clone() for name, tensor in state.items()}


# --- ScaledAdam against its formulas ---------------------------------------------------------------------------------


class PlainScaledAdam:
    """Section 2.1 of the SUBLLM specification with one Python float per number; `seen` says which limits were met."""

    def __init__(self, values: dict[str, list[float]], lr: float, middle: Callable[[list[float]], float]) -> None:
        self.middle = middle
        self.p, self.lr, self.t = {name: list(value) for name, value in values.items()}, lr, 0
        self.v = {name: [0.0] * len(value) for name, value in values.items()}
        self.delta = {name: [0.0] * len(value) for name, value in values.items()}
        self.rms = {name: self._rms(name) for name in values}
        self.products: dict[str, list[float]] = {name: [] for name in values}
        self.size_square = dict.fromkeys(values, 0.0)
        self.norms: list[float] = []
        self.bound: float | None = None
        self.seen: set[str] = set()

    def _rms(self, name: str) -> float:
        return math.sqrt(sum(x * x for x in self.p[name]) / len(self.p[name]))

    def _clip(self, grads: dict[str, list[float]]) -> float:
        size = {name: self.rms[name] if len(grad) > 1 else 0.1 for name, grad in grads.items()}
        norm = math.sqrt(sum((g * size[name]) ** 2 for name, grad in grads.items() for g in grad))
        self.norms.append(norm)
        if self.t in (10, 20, 40):
            self.bound = 2 * 2.0 * self.middle(self.norms[-self.t :])
        elif self.t and self.t % 100 == 0:
            self.bound = 2.0 * self.middle(self.norms[-100:])
        return 1.0 if self.bound is None else min(1.0, self.bound / norm)

    def _growth(self, name: str, lr: float) -> float:
        recent = self.products[name][-4:]
        count, decay = (self.t + 1) // 4, 0.98**4
        self.size_square[name] = decay * self.size_square[name] + (1 - decay) * sum(x * x for x in recent) / 4
        k = -lr * 0.1 * math.sqrt(1 - decay**count) * sum(recent) / (math.sqrt(self.size_square[name]) + 1e-8)
        if abs(k) > 0.1:
            self.seen.add("growth limited")
            k = math.copysign(0.1, k)
        if self.rms[name] < 1e-5:
            self.seen.add("too small")
            return 0.0
        if k > (3.0 - self.rms[name]) / self.rms[name]:
            self.seen.add("too large")
        return min(k, (3.0 - self.rms[name]) / self.rms[name])

    def step(self, grads: dict[str, list[float]], lr_scale: float) -> float:
        clip = self._clip(grads)
        if clip < 1:
            self.seen.add("clipped")
        for name, grad in grads.items():
            self._step_one(name, [clip * g for g in grad], self.lr * lr_scale)
        self.t += 1
        return clip

    def _step_one(self, name: str, grad: list[float], lr: float) -> None:
        scalar = len(grad) == 1
        self.products[name].append(sum(x * g for x, g in zip(self.p[name], grad, strict=True)))
        growth = 0.0
        if self.t % 4 == 3 and not scalar:
            self.rms[name] = self._rms(name)
            growth = self._growth(name, lr)
        size = 0.1 if scalar else max(self.rms[name], 1e-5)
        correction = 1 - 0.98 ** (self.t + 1)
        if not scalar and correction >= 0.99:
            correction = 1.0
        for i, g in enumerate(grad):
            self.v[name][i] = 0.98 * self.v[name][i] + 0.02 * g * g
            adam = -lr * size * g / (math.sqrt(self.v[name][i] / correction) + 1e-8)
            self.delta[name][i] = 0.9 * self.delta[name][i] + 0.1 * (adam + growth * self.p[name][i])
            self.p[name][i] += self.delta[name][i]
            if scalar and abs(self.p[name][i]) > 10:
                self.seen.add("scalar bounded")
                self.p[name][i] = math.copysign(10.0, self.p[name][i])


def double_bag() -> Bag:
    torch.manual_seed(1)
    draw = torch.randn
    tensors = {"matrix": draw(3, 4) * 0.1, "twin": draw(3, 4), "vector": draw(5), "cube": draw(2, 3, 2) * 0.02}
    tensors |= {"tiny": draw(2, 3) * 1e-6, "huge": draw(4, 2).sign() * 2.999}
    tensors |= {"scalar": torch.tensor(0.3), "single": torch.tensor([9.99])}
    return Bag(**{name: tensor.double() for name, tensor in tensors.items()})


def icefall_middle(norms: list[float]) -> float:
    return sorted(norms)[min(len(norms) - 1, 2 * (len(norms) // 4))]


@pytest.mark.parametrize(
    ("lr", "clipping", "branches"),
    [
        (0.03, "model", {"clipped", "too small", "too large", "scalar bounded"}),
        (0.03, "icefall", {"clipped", "too small", "too large", "scalar bounded"}),
        (1.0, "model", {"clipped", "growth limited", "too large", "scalar bounded"}),
    ],
)
def test_scaled_adam_is_its_formulas_in_plain_python(lr: float, clipping: Any, branches: set[str]):
    bag, middle = double_bag(), {"model": statistics.median, "icefall": icefall_middle}[clipping]
    plain = PlainScaledAdam({name: p.flatten().tolist() for name, p in bag.named_parameters()}, lr, middle)
    optimizer = ScaledAdamConfig(lr=lr, clipping=clipping).build(bag)
    for step in range(250):  # past 228, where the bias correction ends
        set_gradients(bag, seed=step, size=25.0 if step % 9 == 8 else 1.0)
        with torch.no_grad():
            for parameter in (bag.huge, bag.single):  # always pushed outwards, against their limits
                parameter.grad = -parameter.sign() * parameter.grad.abs()
        grads = {name: p.grad.flatten().tolist() for name, p in bag.named_parameters()}
        lr_scale = 1.0 / (1 + step / 50)
        report = optimizer.step(lr_scale)
        assert report.clip == pytest.approx(plain.step(grads, lr_scale), rel=1e-10)
        assert report.grad_norm == pytest.approx(plain.norms[-1], rel=1e-10)
        for name, parameter in bag.named_parameters():
            expected = torch.tensor(plain.p[name], dtype=torch.float64)
            torch.testing.assert_close(parameter.detach().flatten(), expected, rtol=1e-9, atol=1e-14, msg=name)
    assert branches <= plain.seen


def test_icefall_clips_the_parameters_of_each_learning_rate_by_themselves():
    config, pair = ScaledAdamConfig(clipping="icefall"), nn.ModuleDict({"slow": double_bag(), "fast": double_bag()})
    alone = {name: double_bag() for name in pair}
    for bag in (pair["slow"], alone["slow"]):
        bag.lr_scale = 0.5
    together, apart = config.build(pair), {name: config.build(bag) for name, bag in alone.items()}
    for step in range(110):
        reports = dict[str, float]()
        for name, bag in alone.items():
            set_gradients(bag, seed=step, size=100.0 if (step + (name == "slow")) % 9 == 0 else 1.0)
            for ours, theirs in zip(pair[name].parameters(), bag.parameters(), strict=True):
                ours.grad = theirs.grad.clone()
            reports[name] = apart[name].step(1.0).clip
        assert together.step(1.0).clip == min(reports.values())
    for name, bag in alone.items():
        assert_same(pair[name].state_dict(), bag.state_dict())
    assert {f"clipping.{group}.norms" for group in range(2)} < together.tensors().keys()


@pytest.mark.parametrize("factor", [0.01, 30.0])
def test_scaled_adam_relative_update_does_not_depend_on_the_size_of_a_weight(factor: float):
    torch.manual_seed(2)
    start = torch.randn(4, 5, dtype=torch.float64) * 0.05
    plain, scaled = Bag(weight=start), Bag(weight=start * factor)
    config = ScaledAdamConfig(eps=1e-30)
    optimizers = [config.build(plain), config.build(scaled)]
    for step in range(60):
        set_gradients(plain, seed=step)
        scaled.weight.grad = plain.weight.grad / factor
        for optimizer in optimizers:
            optimizer.step(1.0)
        torch.testing.assert_close(scaled.weight / factor, plain.weight, rtol=1e-10, atol=0.0)
    assert (plain.weight - start).abs().max() > 0.01


@pytest.mark.parametrize("batch_elements", [0, 50, 10**9])
def test_batching_changes_no_bit(batch_elements: int):
    def run(limit: int | None) -> tuple[int, dict[str, Tensor]]:
        model = Net()
        optimizer = ScaledAdam(ScaledAdamConfig(), model, batch_elements=limit)
        train(model, optimizer, range(15))
        return len(optimizer.batches), snapshot(model, optimizer)

    count, state = run(batch_elements)
    assert count == {0: 9, 50: 4, 10**9: 1}[batch_elements]
    assert_same(state, run(None)[1])


def test_scaled_adam_takes_a_missing_gradient_for_zero():
    left, right = double_bag(), double_bag()
    optimizers = [ScaledAdamConfig().build(left), ScaledAdamConfig().build(right)]
    for step in range(6):
        set_gradients(left, step)
        set_gradients(right, step)
        left.matrix.grad, right.matrix.grad = None, torch.zeros_like(right.matrix)
        for optimizer in optimizers:
            optimizer.step(1.0)
    assert_same(left.state_dict(), right.state_dict())


def test_scaled_adam_without_clipping_never_clips():
    bag = double_bag()
    optimizer = ScaledAdamConfig(clipping_scale=math.inf).build(bag)
    for step in range(30):
        set_gradients(bag, step, size=1000.0 if step > 20 else 1.0)
        assert optimizer.step(1.0).clip == 1.0


def test_scaled_adam_recovers_from_gradients_that_were_zero():
    bag = double_bag()
    optimizer = ScaledAdamConfig().build(bag)
    for _ in range(12):
        set_gradients(bag, 0, size=0.0)
        assert optimizer.step(1.0).clip == 1.0
    set_gradients(bag, 1)
    before = bag.matrix.detach().clone()
    assert optimizer.step(1.0).clip == 1.0
    assert not torch.equal(bag.matrix, before)


# --- AdamW -----------------------------------------------------------------------------------------------------------


def test_adamw_is_torch_adamw_with_clip_grad_norm():
    ours, theirs = Net(), Net()
    optimizer = AdamWConfig(lr=0.01, clip_norm=2.0).build(ours)
    matrices = [p for p in theirs.parameters() if p.dim() >= 2]
    others = [p for p in theirs.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), eps=1e-8, foreach=False, fused=False)
    clips = []
    for step in range(20):
        set_gradients(ours, step, size=0.1 if step % 2 else 1.0)
        set_gradients(theirs, step, size=0.1 if step % 2 else 1.0)
        report = optimizer.step(0.5)
        clips.append(report.clip)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 2.0)
        for group in reference.param_groups:
            group["lr"] = 0.005
        reference.step()
        assert report.grad_norm == norm.item()
        assert report.clip == pytest.approx(min(1.0, 2.0 / norm.item()), rel=1e-5)
    assert min(clips) < 0.5
    assert max(clips) == 1.0
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, theirs.get_parameter(name), rtol=1e-5, atol=1e-7, msg=name)


def test_adamw_decays_matrices_only():
    model = Net()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = AdamWConfig(lr=0.5, weight_decay=0.1).build(model)
    set_gradients(model, 0, size=0.0)
    optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in {f"layers.{i}.weight" for i in range(3)} else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0.0, msg=name)


# --- Muon ------------------------------------------------------------------------------------------------------------


class Wide(nn.Module):
    """A tiny language model with matrices of every shape, and parameters that are no matrices of hidden layers."""

    def __init__(self, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(11, 6)
        self.up, self.square, self.down = nn.Linear(6, 9), Linear(6, 6, bias=False), nn.Linear(9, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.taps = nn.Parameter(torch.randn(4, 6))
        self.head = TiedHead(self.embed) if tied else Head(6, 11)
        self.to(dtype)


HIDDEN = {"up.weight", "square.weight", "down.weight"}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_muon_takes_the_matrices_of_hidden_layers_and_adamw_everything_else(tied: bool):
    model = Wide(tied)
    names = MuonConfig().build(model).tensors().keys()
    assert {name.removeprefix("momentum.") for name in names if name.startswith("momentum.")} == HIDDEN
    others = {name for name, _ in model.named_parameters()} - HIDDEN
    assert {name.removeprefix("first_moment.") for name in names if name.startswith("first_moment.")} == others


def test_a_matrix_tied_to_an_embedding_is_adamw_s_whatever_module_holds_it():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 5), "out": nn.Linear(5, 5, bias=False), "body": nn.Linear(5, 5)})
    model["out"].weight = model["embed"].weight
    names = MuonConfig().build(model).tensors().keys()
    assert {name for name in names if name.startswith("momentum.")} == {"momentum.body.weight"}


@pytest.mark.parametrize("model", [nn.Linear(4, 3, bias=False), nn.LayerNorm(4)], ids=["matrices", "others"])
def test_muon_trains_a_model_of_one_kind_of_parameter(model: nn.Module):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = MuonConfig(lr=0.1).build(model)
    set_gradients(model, 0)
    assert not optimizer.step(1.0).skipped
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("adjust_lr_fn", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_is_torch_muon_and_torch_adamw(adjust_lr_fn: Any, nesterov: bool, tied: bool, dtype: torch.dtype):
    config = MuonConfig(lr=0.02, adamw_lr=0.003, adjust_lr_fn=adjust_lr_fn, nesterov=nesterov, clip_norm=5.0)
    ours, theirs = Wide(tied, dtype), Wide(tied, dtype)
    optimizer, named = config.build(ours), dict(theirs.named_parameters())
    muon = torch.optim.Muon(
        [named[name] for name in HIDDEN],
        weight_decay=0.1,
        momentum=0.95,
        nesterov=nesterov,
        adjust_lr_fn=adjust_lr_fn,
    )
    rest = [parameter for name, parameter in named.items() if name not in HIDDEN]
    groups = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    adamw, clips = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True), []
    for step in range(12):
        scale, size = 1 / (1 + step), 0.1 if step % 2 else 1.0
        set_gradients(ours, step, size)
        set_gradients(theirs, step, size)
        clips.append(optimizer.step(scale).clip)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 5.0)
        for reference, lr in ((muon, 0.02), (adamw, 0.003)):
            for group in reference.param_groups:
                group["lr"] = lr * scale
            reference.step()
    assert min(clips) < 0.9
    assert max(clips) == 1.0
    assert_same(ours.state_dict(), theirs.state_dict())


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (1, 8), (8, 1)], ids=str)
@pytest.mark.parametrize(
    ("adjust_lr_fn", "factor"),
    [
        ("match_rms_adamw", lambda rows, columns: 0.2 * math.sqrt(max(rows, columns))),
        ("original", lambda rows, columns: math.sqrt(max(1, rows / columns))),
    ],
)
def test_a_step_of_muon_has_all_singular_values_near_its_rate(shape: Any, adjust_lr_fn: Any, factor: Any):
    model = nn.Linear(shape[1], shape[0], bias=False)
    before = model.weight.detach().clone()
    optimizer = MuonConfig(lr=0.1, adjust_lr_fn=adjust_lr_fn, weight_decay=0.0).build(model)
    set_gradients(model, 0, size=1e-3)  # however small the gradient
    optimizer.step(1.0)
    values = torch.linalg.svdvals(before - model.weight.detach()) / (0.1 * factor(*shape))
    assert values.min() > 0.3
    assert values.max() < 1.4


# --- What all promise ------------------------------------------------------------------------------------------------


def resume(model: nn.Module, optimizer: Optimizer, config: Config, dtype: torch.dtype) -> tuple[Net, Optimizer]:
    """Through bytes into a fresh model and optimizer."""
    stored = save(optimizer.tensors())
    fresh = Net(dtype)
    fresh.load_state_dict(model.state_dict())
    resumed = config.build(fresh)
    resumed.load_tensors(load(stored))
    return fresh, resumed


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stops", [(1, 2), (13, 26), (20, 43)], ids=str)
def test_resuming_twice_is_bit_identical(config: Config, dtype: torch.dtype, stops: tuple[int, int]):
    straight = Net(dtype)
    optimizer = config.build(straight)
    train(straight, optimizer, range(50))

    model = Net(dtype)
    resumed = config.build(model)
    for start, stop in zip((0, *stops), (*stops, 50), strict=True):
        train(model, resumed, range(start, stop))
        model, resumed = resume(model, resumed, config, dtype)
    assert_same(snapshot(model, resumed), snapshot(straight, optimizer))


@every
def test_every_part_of_the_state_matters(config: Config):
    """Dropping any kind of tensor from the state changes the outcome, so that the test above can fail."""
    model = Net()
    optimizer = config.build(model)
    train(model, optimizer, range(23))
    weights, stored = {k: v.clone() for k, v in model.state_dict().items()}, load(save(optimizer.tensors()))

    def outcome(forgotten: str) -> dict[str, Tensor]:
        fresh = Net()
        fresh.load_state_dict(weights)
        resumed = config.build(fresh)
        start = resumed.tensors()
        resumed.load_tensors({k: start[k] if k.split(".")[0] == forgotten else v for k, v in stored.items()})
        train(fresh, resumed, range(23, 45))
        return fresh.state_dict()

    expected = outcome("nothing")
    for kind in {name.split(".")[0] for name in stored}:
        different = [name for name, tensor in outcome(kind).items() if not torch.equal(tensor, expected[name])]
        assert different, kind


@every
def test_state_is_keyed_by_parameter_names(config: Config):
    model = Net()
    names = config.build(model).tensors().keys()
    kept = {name.split(".", 1)[1] for name in names if name.startswith(("second_moment.", "momentum."))}
    assert kept == {name for name, _ in model.named_parameters()}


@every
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("when", [0, 11])
def test_a_gradient_that_is_not_finite_skips_the_update(config: Config, poison: float, when: int):
    model, undisturbed = Net(), Net()
    optimizer, twin = config.build(model), config.build(undisturbed)
    train(model, optimizer, range(when))
    before = snapshot(model, optimizer)
    set_gradients(model, 0)
    model.layers[1].weight.grad[2, 3] = poison
    report = optimizer.step(1.0)
    assert report.skipped
    assert report.clip == 0.0
    assert not math.isfinite(report.grad_norm)
    assert_same(snapshot(model, optimizer), before)
    optimizer.zero_grad()
    train(model, optimizer, range(when, when + 6))
    train(undisturbed, twin, range(when + 6))
    assert_same(snapshot(model, optimizer), snapshot(undisturbed, twin))


@every
def test_a_finite_gradient_is_not_skipped(config: Config):
    model = Net()
    set_gradients(model, 0)
    assert not config.build(model).step(1.0).skipped


@every
def test_lr_scale_multiplies_down_the_module_tree(config: Config):
    start = torch.tensor([[0.5, -0.2], [0.1, 0.4]])

    def layer() -> nn.Linear:
        linear = nn.Linear(2, 2)
        linear.load_state_dict({"weight": start, "bias": start[0]})
        return linear

    model = nn.ModuleDict({"plain": layer(), "outer": nn.ModuleDict({"first": layer(), "inner": layer()})})
    model["outer"].lr_scale = 0.5
    model["outer"]["inner"].lr_scale = 0.25
    optimizer = config.build(model)
    gradient = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    for parameter in model.parameters():
        parameter.grad = gradient.clone() if parameter.dim() == 2 else gradient[0].clone()
    optimizer.step(1.0)
    for leaf, before in (("weight", start), ("bias", start[0])):
        moved = {name: p.detach() - before for name, p in model.named_parameters() if name.endswith(leaf)}
        full = moved[f"plain.{leaf}"]
        torch.testing.assert_close(moved[f"outer.first.{leaf}"], full * 0.5, rtol=1e-4, atol=1e-8)
        torch.testing.assert_close(moved[f"outer.inner.{leaf}"], full * 0.125, rtol=1e-4, atol=1e-8)
        assert full.abs().min() > 1e-5


@every
def test_lr_scale_zero_holds_a_parameter(config: Config):
    model = Net()
    model.layers[0].lr_scale = 0.0
    optimizer = config.build(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, optimizer, range(9))
    held = {name for name, p in model.named_parameters() if torch.equal(p, before[name])}
    assert held == {"layers.0.weight", "layers.0.bias"}


@every
def test_the_schedule_factor_multiplies_the_configured_rate(config: Config):
    moved = []
    for factor in (1.0, 0.5):
        model = Net()
        before = model.norm.bias.detach().clone() + model.layers[0].bias.detach()
        set_gradients(model, 3)
        config.build(model).step(factor)
        moved.append(model.norm.bias.detach() + model.layers[0].bias.detach() - before)
    torch.testing.assert_close(moved[1], moved[0] * 0.5, rtol=1e-3, atol=1e-7)


def test_a_tied_parameter_is_trained_once_and_a_frozen_one_never():
    model = nn.ModuleDict({"embed": nn.Linear(3, 3, bias=False), "head": nn.Linear(3, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    model["frozen"] = Bag(w=torch.ones(2)).requires_grad_(False)
    assert [weight.name for weight in trainable_weights(model)] == ["embed.weight"]
    model["head"].lr_scale = 0.5
    with pytest.raises(UserError, match=r"lr_scale of head.weight = 0.5: the 1.0 of embed.weight"):
        trainable_weights(model)


@every
def test_models_that_cannot_be_trained_are_refused(config: Config):
    with pytest.raises(UserError, match="trainable parameters = 0"):
        config.build(Bag(w=torch.ones(2)).requires_grad_(False))
    model = Net()
    model.norm.lr_scale = -1.0
    with pytest.raises(UserError, match=r"norm.lr_scale = -1.0"):
        config.build(model)


@every
def test_narrow_parameters_are_rounded_from_an_fp32_master(config: Config):
    narrow, wide = Net(torch.bfloat16), Net(torch.bfloat16).float()
    optimizers = [config.build(narrow), config.build(wide)]
    for step in range(30):
        for model, optimizer in zip((narrow, wide), optimizers, strict=True):
            set_gradients(model, step)
            for parameter in model.parameters():
                parameter.grad = parameter.grad.bfloat16().to(parameter.dtype)
            optimizer.step(0.01)
            optimizer.zero_grad()
            assert all(w.parameter.grad is None and w.master.grad is None for w in optimizer.weights)
    assert_same(narrow.state_dict(), {name: tensor.bfloat16() for name, tensor in wide.state_dict().items()})
    assert {name for name in optimizers[0].tensors() if name.startswith("master.")} == {
        f"master.{name}" for name in narrow.state_dict()
    }


def corruptions() -> list[tuple[Callable[[dict[str, Tensor]], Any], str]]:
    name = "second_moment.norm.weight"
    return [
        (lambda state: state.pop(name), f"missing tensor {name}"),
        (lambda state: state.update(stray=torch.zeros(1)), "unexpected tensor stray"),
        (lambda state: state.update({name: torch.zeros(7)}), f"{name} = .*7.*6"),
        (lambda state: state.update({name: state[name].double()}), f"{name} = .*float64.*float32"),
    ]


@every
@pytest.mark.parametrize(("corrupt", "message"), corruptions(), ids=["missing", "unexpected", "shape", "dtype"])
def test_a_state_that_does_not_fit_is_refused_whole(config: Config, corrupt: Any, message: str):
    model = Net()
    optimizer = config.build(model)
    train(model, optimizer, range(3))
    given = {name: torch.ones_like(tensor) for name, tensor in optimizer.tensors().items()}
    corrupt(given)
    before = snapshot(model, optimizer)
    with pytest.raises(UserError, match=message):
        optimizer.load_tensors(given)
    assert_same(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (ScaledAdamConfig, "lr", -0.1),
        (ScaledAdamConfig, "lr", math.nan),
        (ScaledAdamConfig, "betas", (0.9, 1.0)),
        (ScaledAdamConfig, "eps", 0.0),
        (ScaledAdamConfig, "scalar_lr_scale", 0.0),
        (ScaledAdamConfig, "rms_limits", (3.0, 1.0)),
        (ScaledAdamConfig, "scalar_max", -1.0),
        (ScaledAdamConfig, "size_update_period", 0),
        (ScaledAdamConfig, "clipping_scale", -2.0),
        (ScaledAdamConfig, "clipping_window", 0),
        (AdamWConfig, "lr", 0.0),
        (AdamWConfig, "betas", (-0.1, 0.9)),
        (AdamWConfig, "eps", math.inf),
        (AdamWConfig, "weight_decay", -0.1),
        (AdamWConfig, "clip_norm", 0.0),
        (MuonConfig, "lr", 0.0),
        (MuonConfig, "lr", math.inf),
        (MuonConfig, "betas", (0.9, 1.0)),
        (MuonConfig, "eps", -1.0),
        (MuonConfig, "weight_decay", math.nan),
        (MuonConfig, "clip_norm", -1.0),
        (MuonConfig, "momentum", 1.0),
        (MuonConfig, "momentum", -0.1),
        (MuonConfig, "ns_steps", 0),
        (MuonConfig, "ns_steps", 100),
        (MuonConfig, "adamw_lr", 0.0),
        (MuonConfig, "adamw_lr", math.nan),
    ],
)
def test_config_errors_name_the_field_and_its_value(config: Any, field: str, value: Any):
    with pytest.raises(UserError) as caught:
        config(**{field: value})
    assert str(caught.value).startswith(f"{field} = {value!r}: ")


def test_a_recipe_picks_the_optimizer_by_kind_and_refuses_unknown_keys():
    adapter: TypeAdapter[Any] = TypeAdapter(OptimizerConfig)
    assert adapter.validate_python({"kind": "adamw", "lr": 1e-3, "betas": [0.8, 0.9]}) == AdamWConfig(
        lr=1e-3, betas=(0.8, 0.9)
    )
    assert adapter.validate_python({"kind": "scaled_adam"}) == ScaledAdamConfig()
    assert adapter.validate_python({"kind": "muon", "adjust_lr_fn": "original"}) == MuonConfig(adjust_lr_fn="original")
    with pytest.raises(ValidationError, match="adjust_lr_fn"):
        adapter.validate_python({"kind": "muon", "adjust_lr_fn": "spectral"})
    with pytest.raises(ValidationError, match="weight_decay"):
        adapter.validate_python({"kind": "scaled_adam", "weight_decay": 0.1})
    with pytest.raises(ValidationError, match="a number above 0"):
        adapter.validate_python({"kind": "adamw", "lr": -1.0})
