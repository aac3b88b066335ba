"""Golden dumps: the results of every contract case, to the bit, from one tree of longwave and compared with another's.

    python tests/support/golden.py dump OUT.pt [--tree PATH]
    python tests/support/golden.py compare A.pt B.pt [--allow NAME ...]

A refactor shows by it that outputs, gradients, states, folders and costs have stayed what they were. The script is run
from one tree and reads another (`--tree`), so nothing here imports longwave before that tree is on the path, the cases
are plain data, and the differences between versions stand in the first section and nowhere else.

Results depend on the machine: kernels, and with them the last bit, differ between processors and builds of torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

Values = dict[str, Any]  # a config as plain values
Entry = tuple[str, "Tensor | int | float | str"]
Model = Any  # a `Decoder`, of whichever tree is dumped
ByRun = list[Tensor]  # keys or values (G, N, K) of each run, its past included
Lengths = tuple[int, ...]
HERE = Path(__file__).resolve().parent.parent.parent
DTYPES = (torch.float64, torch.float32, torch.bfloat16)

# --- between versions -------------------------------------------------------------------------------------------------


def use(tree: Path) -> None:
    """Makes `import longwave` find the given tree's."""
    sys.path[:0] = [str(tree), str(tree / "tests")]
    import longwave

    found = Path(longwave.__file__ or "").resolve()
    assert found.is_relative_to(tree.resolve()), f"longwave was found at {found}, not in {tree}"


def translated(values: Values) -> Values:
    """Config values as the tree wants them: `attention.window` has become a table `window` of its own."""
    from longwave import config

    if hasattr(config, "AttentionConfig"):
        return values
    attention = dict(values["attention"])
    size = attention.pop("window", None)
    window = {} if size is None else {"window": {"size": size}}
    return {**values, "attention": attention, **window}


def decoder(values: Values, seed: int) -> Model:
    """A model with the initial weights of a seed."""
    from longwave.config import ModelConfig, build
    from longwave.model import Decoder

    return Decoder(build(ModelConfig, translated(values), "golden"), seed)


def training_stream(lengths: Sequence[int], sizes: Sequence[int], samples: Sequence[int]) -> Any:
    """The stream of documents in training windows, which are known by their places in the data."""
    from longwave.streams import Stream, Windows

    return Stream.of(lengths, windows=Windows(tuple(sizes), tuple(samples)))


def stream(lengths: Sequence[int]) -> Any:
    """The stream of whole sequences."""
    from longwave.streams import Stream

    return Stream.of(lengths)


def folder_names(model: Model) -> dict[str, str]:
    """The name that each tensor has in a folder, by its name in the module tree, which may change."""
    from longwave.checkpoints.names import flat_names

    return flat_names(model)


def optimizers() -> dict[str, Any]:
    """A config of every optimizer, with few enough steps between updates of ScaledAdam's sizes to see one."""
    from longwave.training.optimizers import AdamWConfig, ScaledAdamConfig

    return {"adamw": AdamWConfig(lr=3e-3), "scaled_adam": ScaledAdamConfig(size_update_period=2)}


class OldOps:
    """Ops that take the lengths of runs, and keys either in the layout of the stream or as one tensor per run."""

    @staticmethod
    def forms(op: str) -> list[str]:
        from longwave.ops import compiled

        forms = import_module(f"longwave.ops.{op}").FORMS
        return [form for form in forms if form != "compiled" or compiled.is_available()]

    @staticmethod
    def attention(form: str, query: Tensor, keys: ByRun, values: ByRun, lengths: Lengths, **more: Any) -> Tensor:
        from longwave.ops.attention import attention

        return attention(query, *_as_taken(keys, values, lengths), lengths, form=form, scale=0.3, **more)

    @staticmethod
    def block_sparse(form: str, query: Tensor, keys: ByRun, values: ByRun, lengths: Lengths, **more: Any) -> Tensor:
        from longwave.ops.block_sparse import Geometry, block_sparse_attention

        shape = Geometry(kernel_size=4, stride=2, block_size=4, init_blocks=1, local_blocks=1, topk=4)
        taken = _as_taken(keys, values, lengths)
        return block_sparse_attention(query, *taken, lengths, shape, form=form, scale=0.3, **more)

    @staticmethod
    def decay_linear(
        form: str, heads: Sequence[Tensor], decay: Tensor, lengths: Lengths, states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from longwave.ops.decay_linear import decay_linear_attention

        query, key, value = heads
        return decay_linear_attention(query, key, value, decay, lengths, scale=0.3, states=states, form=form)


def _as_taken(keys: ByRun, values: ByRun, lengths: Lengths) -> tuple[Any, Any]:
    """Keys and values in the layout of the stream where no run has a past, and per run elsewhere."""
    if any(key.shape[1] != length for key, length in zip(keys, lengths, strict=True)):
        return keys, values
    return torch.cat(keys, 1).transpose(0, 1), torch.cat(values, 1).transpose(0, 1)


class NewOps:
    """Ops that take `Runs`, and head-major keys in which the runs lie at `Places`."""

    @staticmethod
    def forms(op: str) -> list[str]:
        from longwave.ops import compiled

        forms = getattr(import_module(f"longwave.ops.{op}"), op.upper()).forms
        return [form for form in forms if form != "compiled" or compiled.is_available()]

    @staticmethod
    def attention(
        form: str, query: Tensor, keys: ByRun, values: ByRun, lengths: Lengths, window: int | None = None
    ) -> Tensor:
        from longwave.ops.attention import Pattern, attention

        taken = _head_major(keys, values, lengths)
        return attention(query, *taken, pattern=Pattern(window), form=form, scale=0.3).output

    @staticmethod
    def block_sparse(form: str, query: Tensor, keys: ByRun, values: ByRun, lengths: Lengths, **more: Any) -> Tensor:
        from longwave.ops.block_sparse import Geometry, block_sparse_attention

        shape = Geometry(kernel_size=4, stride=2, block_size=4, init_blocks=1, local_blocks=1, topk=4)
        taken = _head_major(keys, values, lengths)
        return block_sparse_attention(query, *taken, shape, form=form, dense_form=form, scale=0.3, **more)

    @staticmethod
    def decay_linear(
        form: str, heads: Sequence[Tensor], decay: Tensor, lengths: Lengths, states: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        from longwave.ops.decay_linear import decay_linear_attention
        from longwave.streams import Runs

        query, key, value = heads
        return decay_linear_attention(query, key, value, decay, Runs.of(lengths), scale=0.3, states=states, form=form)


def _head_major(keys: ByRun, values: ByRun, lengths: Lengths) -> tuple[Any, ...]:
    """Keys and values (G, N, K) of all runs, the runs, and where their keys lie if some have a past."""
    from longwave.streams import Places, Runs

    ends = torch.tensor([key.shape[1] for key in keys]).cumsum(0)
    begins = ends - torch.tensor([key.shape[1] for key in keys])
    past = any(key.shape[1] != length for key, length in zip(keys, lengths, strict=True))
    key, value = (torch.cat(side, 1) for side in (keys, values))
    return key, value, Runs.of(lengths), Places(begins, ends) if past else None


def ops_of_tree() -> Any:
    """The adapter that fits the tree's ops."""
    from longwave.ops.attention import attention

    return OldOps if "lengths" in signature(attention).parameters else NewOps


# --- cases: those of tests/support/contract.py, as plain data ---------------------------------------------------------

VOCABULARY, WIDTH = 61, 32
SPARSE = {"kernel_size": 2, "kernel_stride": 1, "block_size": 2, "window_size": 2, "topk": 2, "dense_len": 9}
CAUSAL = {"selection": "causal"}
NESTED = "F subllm(0.6: W subllm(0.6: F) F) F"
RICH = {"heads": 4, "kv_heads": 1, "head_size": 6, "qkv_bias": True, "output_bias": True, "qk_norm": True}
MINIMAX = {"slopes": "minimax", "silu": "qkv", "qk_norm": False, "rotary": False, "scale": "1"}
TRANSNORMER = {"kv_heads": 2, "slopes": "transnormer", "silu": "qk", "rotary": False, "scale": "1"}


def _case(layout: str, **fields: Any) -> Values:
    attention = {"heads": 4, "kv_heads": 2, **({"window": 5} if "W" in layout else {})}
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "layout": layout}
    needs = {"infllm": SPARSE} if "S" in layout else {}
    return {**shape, "attention": attention, "mlp": {"size": 40}, "init": {"std": 0.2}, **needs, **fields}


CASES: dict[str, Values] = {
    **{f"block {letter}": _case(f"3{letter}") for letter in "FWLS"},
    "resampler subllm": _case("F subllm(0.6: F) F"),
    **{f"subllm around {a}": _case(f"{a} subllm(0.6: {a} subllm(0.6: {a}) {a}) {a}") for a in "FWLS"},
    "biases, norms and scales": _case(
        "2F", attention=RICH, scales={"embedding": 3.0, "residual": 0.7, "logits": 0.5}, tie_embeddings=True
    ),
    "subllm on the embeddings, and beside another": _case("subllm(0.5: F) F subllm(0.5: W)"),
    "sparse without a threshold": _case("2S", infllm={**SPARSE, "regime": "sparse"}),
    "dense, scaled by the position": _case("2S", infllm={"regime": "dense", "logit_scaling": 3.0}),
    "linear layers by distance in the sequence": _case(
        "L subllm(0.6: L subllm(0.6: S L) L) L", lightning={"distance": "original"}
    ),
    "subllm around a hybrid": _case("2S subllm(0.64: 3L S 3L S subllm(0.64: 4L) 3L) 2S", subllm=CAUSAL),
    "linear layers of MiniMax": _case("3L", lightning=MINIMAX),
    "linear layers of TransNormer, fewer KV heads": _case("3L", lightning=TRANSNORMER),
    "subllm causal": _case(NESTED, subllm=CAUSAL),
    "subllm ranked draws": _case(NESTED, subllm={"discard_sampling": "ranked"}),
    "subllm by document": _case(NESTED, subllm={"ranking": "document"}),
}


@torch.no_grad()
def model_of(values: Values, dtype: torch.dtype) -> Model:
    """A model whose scores are large enough that tokens are kept and dropped at every level, and weighed in between."""
    model, causal = decoder(values, 0), values.get("subllm") == CAUSAL
    for name, tensor in by_name(model, model.state_dict(keep_vars=True)):
        if name.startswith("resamplers."):
            _widen(name, tensor, causal)
    return model.to(dtype).eval()


def _widen(name: str, tensor: Tensor, causal: bool) -> None:
    if name.endswith(".score.weight"):
        tensor.mul_(8)
    elif name.endswith(".bypass"):
        tensor.uniform_(0.3, 1.1, generator=torch.Generator().manual_seed(0))
    elif causal and name.endswith((".threshold.low", ".threshold.high")):
        tensor.fill_(0.1 if name.endswith("low") else 0.9)


def by_name(model: Model, tensors: dict[str, Any]) -> list[tuple[str, Any]]:
    """Tensors by their names in a folder, given by those in the module tree."""
    names = folder_names(model)
    return sorted((names[name], tensor) for name, tensor in tensors.items() if name in names)


# --- what a model gives -----------------------------------------------------------------------------------------------

TEXT = torch.randint(0, VOCABULARY, (4096,), generator=torch.Generator().manual_seed(1))


class Served:
    """Sequences in the slots of one state, which take turns at reading on in one endless text."""

    def __init__(self, model: Model, slots: int) -> None:
        self.model, self.state, self.at = model, model.state(slots), 0

    @torch.no_grad()
    def run(self, *lengths: int, slots: Sequence[int] | None = None) -> Tensor:
        """Logits of the next `lengths[r]` tokens in slot `slots[r]`, of slots 0, 1, ... by default."""
        start, self.at = self.at, self.at + sum(lengths)
        return self.model(TEXT[start : self.at], self.state.stream(lengths, slots), self.state)

    def used(self) -> Tensor:
        """Bytes of each slot that later tokens can see."""
        return torch.tensor([self.state.used_bytes(slot) for slot in range(self.state.slots)])

    def truncate(self, slot: int, length: int) -> int:
        """Whether the slot can be cut to a length; it is, if so."""
        try:
            self.state.truncate(slot, length)
        except ValueError:
            return 0
        return 1


@torch.no_grad()
def without_state(model: Model) -> Iterator[Entry]:
    """Whole sequences: alone, several in a stream with an empty run, of equal lengths, and their last rows only."""
    for lengths in ((60,), (23, 0, 17), (9, 30), (12, 12, 12)):
        yield f"whole {lengths}", model(TEXT[: sum(lengths)], stream(lengths))
    yield "last rows", model(TEXT[:40], stream((23, 0, 17)).last_rows())


def in_pieces(model: Model) -> Iterator[Entry]:
    """One sequence in uneven pieces, one of them empty, with and without room reserved for it."""
    for room in (0, 64):
        served = Served(model, 1)
        served.state.reserve(room)
        yield f"pieces, {room} reserved", torch.cat([served.run(n) for n in (7, 1, 0, 20, 1, 1, 13, 17)])
        yield f"pieces, {room} reserved, used", served.used()


def decoding(model: Model) -> Iterator[Entry]:
    """Five sequences of different lengths, token by token: some rounds leave slots out, give them nothing, or mix."""
    served = Served(model, 5)
    yield "prefill", served.run(0, 3, 9, 17, 26)
    yield "prefill, used", served.used()
    for turn in range(12):
        yield f"round {turn}", _round(served, turn)
    yield "rounds, used", served.used()


def _round(served: Served, turn: int) -> Tensor:
    """A round in which slots may be left out (every third), given no token (every third), or stand in another order."""
    if turn % 3 == 0:
        return served.run(1, 1, 1, 1, 1)
    if turn % 3 == 1:
        return served.run(*(int((slot + turn) % 4 > 0) for slot in range(5)))
    slots = [slot for slot in (3, 0, 4, 2, 1) if (slot + turn) % 3]
    return served.run(*[1] * len(slots), slots=slots)


def rollback(model: Model) -> Iterator[Entry]:
    """Slots of 20, 13 and 7 tokens that are restored, truncated, held, reordered and released, and run on each time."""
    served = Served(model, 3)
    state, steps = served.state, iter(range(100))
    served.run(20, 13, 7)

    def after(what: str, *lengths: int) -> Iterator[Entry]:
        name = f"{next(steps):02} {what}"
        yield f"{name}, used", served.used()
        yield name, served.run(*lengths)

    snapshot = state.snapshot(1)
    yield from after("snapshot", 0, 6, 0)
    state.restore(snapshot)
    yield from after("restore", 1, 4, 2)
    state.restore(snapshot)
    yield from after("second restore", 0, 3, 0)
    for slot, length in ((0, 18), (1, 15), (2, 4), (1, 2), (0, 0)):
        yield f"truncation of {slot} to {length}", served.truncate(slot, length)
        yield from after(f"truncation of {slot}", 2, 1, 3)
    state.hold(2)
    served.run(0, 0, 5)
    yield "truncation of what is held", served.truncate(2, 8)
    yield from after("hold", 1, 1, 1)
    state.reorder([2, 0, 2])
    yield from after("reorder", 1, 2, 3)
    state.release(1)
    yield from after("release", 9, 4, 1)


# --- training ---------------------------------------------------------------------------------------------------------

DOCUMENTS, SIZES, SAMPLES = (10, 14, 20), (24, 20), (5, 9)


def loss_of(model: Model) -> Tensor:
    """The loss of two windows, one of two documents, whose last tokens have no target."""
    ends = torch.tensor(DOCUMENTS).cumsum(0) - 1
    tokens, targets = TEXT[: sum(DOCUMENTS)], TEXT[1 : sum(DOCUMENTS) + 1].index_fill(0, ends, -100)
    return model.loss(tokens, targets, training_stream(DOCUMENTS, SIZES, SAMPLES))


def training(model: Model) -> Iterator[Entry]:
    """Logits, losses and gradients: plain, with blocks that are recomputed, and (fp32) computing in bf16."""
    model.train().set_step(3, seed=1)
    with torch.no_grad():
        yield "logits", model(TEXT[: sum(DOCUMENTS)], training_stream(DOCUMENTS, SIZES, SAMPLES))
    single = next(model.parameters()).dtype == torch.float32
    for mode in ("plain", "recomputed", *(["autocast"] if single else [])):
        model.zero_grad()
        model.checkpoint_blocks(mode == "recomputed")
        with torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
            loss = loss_of(model)
        loss.backward()
        yield f"{mode} loss", loss
        for name, one in by_name(model, dict(model.named_parameters())):
            yield f"{mode} gradient/{name}", "none" if one.grad is None else one.grad
    yield from _thresholds(model)


def _thresholds(model: Model) -> Iterator[Entry]:
    """Every buffer after two more optimizer steps, by which causal thresholds move."""
    for step in (4, 5):
        model.set_step(step, seed=1)
        yield f"loss of step {step}", loss_of(model)
    model.set_step(6, seed=1)
    for name, buffer in by_name(model, dict(model.named_buffers())):
        yield f"buffers/{name}", buffer


def optimizer_steps(make: Callable[[], Model]) -> Iterator[Entry]:
    """Parameters after two steps of each optimizer."""
    for kind, config in optimizers().items():
        model = make().train()
        optimizer = config.build(model)
        for step in range(2):
            model.set_step(step, seed=1)
            loss_of(model).backward()
            report = optimizer.step(0.5)
            optimizer.zero_grad()
            yield f"{kind}/norm {step}", report.grad_norm
        for name, parameter in by_name(model, dict(model.named_parameters())):
            yield f"{kind}/{name}", parameter


# --- folders and costs ------------------------------------------------------------------------------------------------


def saved(model: Model) -> Iterator[Entry]:
    """The tensors of a saved folder, its config, and logits of the model that is loaded from it."""
    import longwave

    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        longwave.save(model, folder)
        with safe_open(folder / "model.safetensors", "pt") as file:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)
        yield "config.json", json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True)
        with torch.no_grad():
            yield "loaded", longwave.load(folder).eval()(TEXT[:20], stream((20,)))


def costs(model: Model) -> Iterator[Entry]:
    """Every figure of every part at three contexts."""
    for tokens in (1, 40, 3000):
        for at, cost in enumerate(model.costs(tokens)):
            for name, value in dataclasses.asdict(cost).items():
                yield f"{tokens}/{at:02} {name}", value


def results(values: Values, dtype: torch.dtype) -> Iterator[Entry]:
    """Everything that one case gives in one dtype."""
    model = model_of(values, dtype)
    parts: dict[str, Iterator[Entry]] = {
        "stateless": without_state(model),
        "pieces": in_pieces(model),
        "decoding": decoding(model),
        "rollback": rollback(model),
        "saved": saved(model),
        "costs": costs(model),
        "training": training(model_of(values, dtype)),
        "optimizers": optimizer_steps(lambda: model_of(values, dtype)),
    }
    for part, entries in parts.items():
        yield from _under(part, entries)


def _under(prefix: str, entries: Iterator[Entry]) -> Iterator[Entry]:
    return ((f"{prefix}/{name}", value) for name, value in entries)


# --- ops --------------------------------------------------------------------------------------------------------------

RUNS = {"equal": ((6, 6), (0, 0)), "ragged": ((7, 0, 19, 5), (0, 0, 0, 0)), "one": ((30,), (0,))}
PASTS = {"past": ((4, 1, 0, 9), (0, 21, 3, 16)), "decoding": ((1, 1, 1), (0, 40, 13)), "same past": ((3, 3), (14, 14))}


def op_results(ops: Any) -> Iterator[Entry]:
    """Attention, block-sparse attention and decay linear attention in every form, of whole runs and after a past."""
    softmax = {
        "attention": [{}, {"window": 3}],
        "block_sparse": [{}, {"dense_below": 9}, {"denominator": "exact"}],
    }
    for dtype in DTYPES:
        for op, options in softmax.items():
            for form in ops.forms(op):
                yield from _under(f"{op}/{_short(dtype)}/{form}", _softmax(getattr(ops, op), form, dtype, options))
        for form in ops.forms("decay_linear"):
            yield from _under(f"decay_linear/{_short(dtype)}/{form}", _linear(ops.decay_linear, form, dtype))


@torch.no_grad()
def _softmax(op: Callable[..., Tensor], form: str, dtype: torch.dtype, options: list[Values]) -> Iterator[Entry]:
    for name, (lengths, pasts) in {**RUNS, **PASTS}.items():
        totals = [length + past for length, past in zip(lengths, pasts, strict=True)]
        query = _normal(sum(lengths), 4, 8, dtype=dtype)
        keys, values = ([_normal(2, n, 8, dtype=dtype, seed=seed) for n in totals] for seed in (1, 2))
        for more in options:
            yield f"{name} {more}", op(form, query, keys, values, lengths, **more)


@torch.no_grad()
def _linear(op: Callable[..., tuple[Tensor, Tensor]], form: str, dtype: torch.dtype) -> Iterator[Entry]:
    wide = torch.promote_types(dtype, torch.float32)
    for name, (lengths, _) in RUNS.items():
        tokens = sum(lengths)
        heads = [_normal(tokens, 4, 8, dtype=dtype, seed=seed) for seed in range(3)]
        for rows in (1, tokens):
            decay = -_normal(rows, 4, dtype=wide).abs()
            for states in (None, _normal(len(lengths), 4, 8, 8, dtype=wide)):
                output, memory = op(form, heads, decay, lengths, states)
                what = f"{name}, {rows} decays, {'no past' if states is None else 'past'}"
                yield what, output
                yield f"{what}, memory", memory


def _normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


# --- dumping and comparing --------------------------------------------------------------------------------------------


def dump(path: Path) -> None:
    """Writes every entry of every case, as it is computed by one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    for name, value in _all():  # copied at once, since many of the tensors go on changing
        found[name] = value.detach().clone() if isinstance(value, Tensor) else value
    torch.save(found, path)
    print(f"{len(found):,} entries in {path}")


def _all() -> Iterator[Entry]:
    yield from _under("ops", op_results(ops_of_tree()))
    for name, values in CASES.items():
        for dtype in DTYPES:
            yield from _under(f"{name}/{_short(dtype)}", results(values, dtype))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def compare(one: Path, other: Path, allowed: Sequence[str]) -> int:
    """Prints each entry that is not the same to the bit; 1 if any is that was not expected to differ, else 0."""
    a, b = (torch.load(path, weights_only=True) for path in (one, other))
    problems = {name: problem for name in {**a, **b} if (problem := difference(a.get(name), b.get(name)))}
    expected = {name for name in problems if any(name.endswith(f"/{end}") or fnmatch(name, end) for end in allowed)}
    for name, problem in problems.items():
        print(f"{'expected to differ: ' if name in expected else ''}{name}: {problem}")
    print(f"{len({**a, **b}) - len(problems):,} entries are equal, {len(problems):,} differ ({len(expected)} expected)")
    return int(problems.keys() > expected)


def difference(a: Any, b: Any) -> str:
    """How two entries differ; nothing where they are the same to the bit."""
    if a is None or b is None:
        return f"only in {'A' if b is None else 'B'}"
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        return "" if type(a) is type(b) and a == b else f"{a!r:.100} and {b!r:.100}"
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return f"{a.dtype} {tuple(a.shape)} and {b.dtype} {tuple(b.shape)}"
    if not (differing := int(_bits(a).ne(_bits(b)).any(-1).sum())):
        return ""
    return f"largest difference {(a.double() - b.double()).abs().max():.3g}, {differing} of {a.numel()} entries differ"


def _bits(tensor: Tensor) -> Tensor:
    """The bytes (N, size) of each of N numbers, by which -0 is not 0, and NaN is NaN."""
    return tensor.contiguous().flatten().unsqueeze(1).view(torch.uint8)


def main() -> int:
    """Dumps a tree, or compares two dumps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    dumping = commands.add_parser("dump", help="write the results of a tree")
    dumping.add_argument("out", type=Path)
    dumping.add_argument("--tree", type=Path, default=HERE, help="default: the one of this script")
    comparing = commands.add_parser("compare", help="print what differs between two dumps")
    comparing.add_argument("one", type=Path)
    comparing.add_argument("other", type=Path)
    comparing.add_argument("--allow", action="append", default=[], help="a name, its end or a pattern that may differ")
    options = parser.parse_args()
    if options.command == "compare":
        return compare(options.one, options.other, options.allow)
    use(options.tree)
    dump(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
