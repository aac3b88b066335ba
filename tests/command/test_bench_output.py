"""What a benchmark leaves: tables that lose no figure, bars, pictures, traces, kept runs and their comparison."""

from __future__ import annotations

import copy
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from longwave.benchmarks import models, ops
from longwave.benchmarks.measure.memory import peak_memory
from longwave.benchmarks.measure.profile import Part, Profiler, Spent, Traced, named
from longwave.benchmarks.measure.timing import Task, Timing
from longwave.benchmarks.models import BenchOptions, Longwave, Transformers
from longwave.benchmarks.results.compare import compare, read
from longwave.benchmarks.results.picture import draw
from longwave.benchmarks.results.results import Model, Results, Row
from longwave.benchmarks.results.table import bars, show, tables
from longwave.cli import main
from longwave.config import ModelConfig
from longwave.costs import Peaks, Work
from longwave.errors import UserError
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig
from longwave.model import Decoder

PEAKS = Peaks(bandwidth=1e12, flops=1e10)
LONG = "a-model-with-a-rather-long-name-of-its-own, and the dynamic cache"
CPU = torch.device("cpu")


def row(seconds: tuple[float, ...] = (0.2, 0.1, 0.4), **values: Any) -> Row:
    """A decode row with all there is."""
    state = {"retention": (0.64, 0.4096), "state_used": 123 << 20, "state_reserved": 456 << 20}
    place = {"quantity": "decode", "context": 131072, "batch": 8, "subject": LONG}
    figures = {"timing": Timing(seconds), "tokens": 8, "work": Work(1e9, 1e11), "bound": 0.1, "peaks": PEAKS}
    return Row(**place | figures | {"ratio": 1.234, "bound_ratio": 0.777} | state | values)


def results(*rows: Row) -> Results:
    facts = {"device": "a CPU", "threads": 2, "torch": "2.13", "dtype": "fp32"}
    return Results("inference", BenchOptions(), facts, PEAKS, list(rows), {"llama": Model("12F", 1000)})


def decoder(layout: str = "2F subllm(0.64: F)") -> Decoder:
    shape = AttentionConfig(heads=4, kv_heads=2)
    return Decoder(ModelConfig(61, 32, layout, context_window=64, attention=shape, mlp=MLPConfig(48))).eval()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A recipe of a tiny model."""
    path = tmp_path / "tiny.toml"
    text = '[model]\nvocab_size = 61\nhidden_size = 32\nlayout = "F subllm(0.64: F)"\ncontext_window = 64\n'
    path.write_text(text + "[model.attention]\nheads = 4\n[model.mlp]\nsize = 48\n")
    return path


@pytest.fixture
def longwave(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """Runs `longwave bench` in this process: exit code, lines of stdout, and the last line of stderr."""
    for module in (models, ops):
        monkeypatch.setattr(module, "measure_peaks", lambda *_: PEAKS)

    def run(*arguments: object) -> tuple[int, list[str], str]:
        capsys.readouterr()
        code = main(["bench", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out.splitlines(), (err.splitlines() or [""])[-1]

    return run


# --- tables and bars --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", ["40", "80", "400"])
def test_a_table_loses_no_figure(columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", columns)
    show(*tables(results(row())))
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if LONG in line and "131,072" in line)
    figures = ["200.00 ms", "100.00 ms - 400.00 ms", "40.0", "50%", "1.234", "0.777", "0.640 0.410"]
    assert [one for one in [*figures, "123 MiB", "456 MiB"] if one not in line] == []
    assert "…" not in out


def test_every_figure_stands_beside_its_bound(capsys: pytest.CaptureFixture[str]):
    show(*tables(results(row(bound=0.05, quantity="prefill"))))
    out = capsys.readouterr().out
    header, line = (next(one for one in out.splitlines() if word in one) for word in ("spread", "131,072"))
    assert header.index("bound") < line.index("50.00 ms") + len("50.00 ms") == header.index("bound") + len("bound")
    assert "200.00 ms, bound 50.00 ms (25%)" in out


def test_bars_are_solid_up_to_the_bound():
    rows = [row((1.0,), bound=0.5, subject="a"), row((0.5,), bound=0.75, subject="b"), row((3.0,), context=1)]
    lines = bars(rows).plain.splitlines()
    width = lines[1].count("█") + lines[1].count("░")
    assert (lines[1].count("█"), lines[1].count("·")) == (width // 2, 0)
    assert [lines[2].count(mark) for mark in "█░·"] == [width // 2, 0, width // 4]
    assert lines[4].count("█") + lines[4].count("░") == width  # another context has a scale of its own


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "head"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_a_picture_is_drawn_the_same_every_time(suffix: str, head: bytes, tmp_path: Path):
    found = results(row(subject="a"), row(subject="b"), row(quantity="prefill", subject="a"))
    for name in ("one", "two"):
        draw(found, tmp_path / f"{name}.{suffix}")
    assert (tmp_path / f"one.{suffix}").read_bytes().startswith(head)
    assert (tmp_path / f"one.{suffix}").read_bytes() == (tmp_path / f"two.{suffix}").read_bytes()


def test_without_matplotlib_nothing_is_timed(longwave, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(models, "measure_peaks", lambda *_: pytest.fail("it was timed"))
    code, _, line = longwave("inference", model, "--plot", tmp_path / "x.svg")
    assert (code, line) == (2, "longwave: plot: matplotlib is not installed; pip install 'longwave[plot]'")


# --- traces -----------------------------------------------------------------------------------------------------------


def ranges(path: Path) -> list[dict[str, Any]]:
    """The ranges of a trace that are named by us."""
    events = json.loads((gzip.open if path.suffix == ".gz" else open)(path).read())["traceEvents"]
    return [event for event in events if event.get("cat") == "user_annotation" and event["ph"] == "X"]


def traced(task: Task, parts: list[Part], path: Path) -> dict[str, dict[str, Spent]]:
    """Traces one task, called `the task`."""
    profiler = Profiler(CPU, trace=True)
    profiler.keep("quantity", "name", Traced("the task", task, parts))
    return profiler.write(path)


def hooks(model: nn.Module) -> int:
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


def test_a_trace_names_the_parts_and_leaves_no_hook(tmp_path: Path):
    model = decoder("F subllm(0.64: F subllm(0.64: F))")
    one = Longwave("subllm", model)
    task = one.prefill(torch.arange(40))
    assert peak_memory(task, CPU) > 40 * 32 * 4  # the embedded tokens, to begin with
    spent = traced(task, one.parts(), tmp_path / "trace.json.gz")
    found = ranges(tmp_path / "trace.json.gz")
    whole = next(event for event in found if event["name"] == "the task")
    for name in ("embed", "norm", "blocks.0.mixer", "blocks.1.mlp", "blocks.2.mixer", "resamplers.0"):
        (part,) = (event for event in found if event["name"] == name)
        assert whole["ts"] <= part["ts"] <= part["ts"] + part["dur"] <= whole["ts"] + whole["dur"]
    outer, inner = (next(e for e in found if e["name"] == name) for name in ("resamplers.0", "blocks.1"))
    assert outer["ts"] <= inner["ts"] <= inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"]
    (kinds,) = spent.values()
    assert {name: kinds[name].calls for name in ("mixers F", "MLPs", "norms", "resamplers")} == {
        "mixers F": 3,
        "MLPs": 3,
        "norms": 7,
        "resamplers": 2,
    }
    assert sum(one.seconds for one in kinds.values()) == pytest.approx(whole["dur"] / 1e6, rel=0.02)
    assert hooks(model) == 0


def test_the_backward_pass_belongs_to_the_parts(tmp_path: Path):
    """Of two layers the one that is 2,500 times the work of the other takes longer, backward too."""
    heavy, light = nn.Linear(512, 512), nn.Linear(512, 2)
    inputs = torch.ones(2000, 512)
    parts = [Part("one", "heavy", heavy), Part("other", "light", light)]
    (kinds,) = traced(lambda: light(heavy(inputs)[:200]).sum().backward(), parts, tmp_path / "trace.json").values()
    assert kinds["heavy"].backward > kinds["light"].backward > 0
    assert kinds["heavy"].forward > kinds["light"].forward > 0
    assert kinds["summing gradients"].backward > 0


@pytest.mark.parametrize("kind", [Longwave, lambda _, model: Transformers(model)], ids=["longwave", "transformers"])
def test_every_part_of_a_training_step_is_named(kind: Any, tmp_path: Path):
    one = kind("longwave", decoder("3F"))
    task = one.trainer(torch.arange(40).view(2, 20), "fp32")
    (kinds,) = traced(task, one.parts(), tmp_path / "trace.json").values()
    layers, rest = {"mixers F", "MLPs", "norms"}, {"embedding", "residuals"}
    if one.name == "transformers":
        norms = {"model.norm", "model.layers.input_layernorm", "model.layers.post_attention_layernorm"}
        layers, rest = {"model.layers.self_attn", "model.layers.mlp", "lm_head", *norms}, {"model.embed_tokens"}
    assert {name for name in layers | rest if kinds[name].backward > 0} == layers | rest
    assert {name for name in layers if kinds[name].calls % 3 == 0} == layers - {"lm_head", "model.norm", "norms"}
    assert kinds["optimizer"].forward > 0


def test_ranges_are_closed_and_hooks_removed_when_a_part_fails():
    class Fails(nn.Module):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no")

    part = Part("fails", "failures", Fails())
    with pytest.raises(RuntimeError, match="no"), named([part]):
        part.module(torch.ones(1))
    assert hooks(part.module) == 0


# --- kept runs --------------------------------------------------------------------------------------------------------


def kept(path: Path, change: Callable[[dict[str, Any]], object] = lambda plain: None) -> Path:
    """A file as --save writes it, with a change."""
    plain = results(row(), row(quantity="prefill", subject="llama")).plain()
    change(plain)
    path.write_text(json.dumps(plain))
    return path


def times(*seconds: float) -> Callable[[dict[str, Any]], object]:
    """Sets the first row's rounds."""

    def change(plain: dict[str, Any]) -> None:
        plain["rows"][0] = row(seconds).plain()

    return change


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        ((1.0, 1.1, 0.9), (1.0, 1.1, 0.9), "same"),
        ((1.0, 1.1, 0.9), (1.2, 1.3, 1.15), "slower"),
        ((1.2, 1.3, 1.15), (1.0, 1.1, 0.9), "faster"),
        ((1.0, 1.3, 0.9), (1.2, 1.3, 1.15), "same"),  # within the spread before
        ((1.0, 1.1, 0.9), (1.2, 1.3, 0.95), "same"),  # the spread after holds what it was
        ((1.0, 1.01, 0.99), (1.04, 1.05, 1.03), "same"),  # outside both, below the threshold
        ((1.0, 1.01, 0.99), (1.06, 1.07, 1.05), "slower"),
    ],
)
def test_a_verdict_looks_at_both_spreads(before: Any, after: Any, verdict: str, tmp_path: Path):
    files = [kept(tmp_path / "a.json", times(*before)), kept(tmp_path / "b.json", times(*after))]
    first, second = compare(*map(read, files), threshold=0.05).rows
    assert (first.verdict, second.verdict) == (verdict, "same")
    assert first.ratio == pytest.approx(after[0] / before[0])


def test_what_differs_and_what_only_one_has_is_named(longwave, tmp_path: Path):
    def change(plain: dict[str, Any]) -> None:
        plain["hardware"] |= {"torch": "2.14", "threads": 4}
        plain["peaks"]["bandwidth"] = 5e11
        plain["rows"][1] = row(quantity="prefill", subject="another").plain()
        plain["rows"][0]["work"]["flops"] = 2e9

    code, out, _ = longwave("compare", kept(tmp_path / "a.json"), kept(tmp_path / "b.json", change), "--json")
    assert code == 0
    found = json.loads(out[-1])
    assert found["differs"] == {
        "torch": ["2.13", "2.14"],
        "threads": [2, 4],
        "measured bandwidth": ["1e+12/s", "5e+11/s"],
        f"FLOPs of decode, 131,072 tokens, batch 8, {LONG}": [1e9, 2e9],
    }
    assert [found[name] for name in ("only_before", "only_after")] == [
        [f"prefill, 131,072 tokens, batch 8, {name}"] for name in ("llama", "another")
    ]
    assert "torch: 2.13 before, 2.14 after" in out


def test_a_regression_is_exit_code_1_after_the_table_and_the_json(longwave, tmp_path: Path):
    files = kept(tmp_path / "a.json"), kept(tmp_path / "b.json", times(0.9, 0.8, 0.95))
    code, out, line = longwave("compare", *files, "--json")
    assert (code, line) == (1, f"longwave: slower in {files[1]}: 1 of 2 rows")
    assert [one["verdict"] for one in json.loads(out[-1])["rows"]] == ["slower", "same"]
    assert longwave("compare", *files, "--threshold", "0.99")[0] == 1  # 4.5 times as long is more than that too
    assert longwave("compare", *reversed(files))[0] == 0


def test_a_row_of_too_few_rounds_is_not_judged(longwave, tmp_path: Path):
    files = kept(tmp_path / "a.json", times(1.0)), kept(tmp_path / "b.json", times(9.0))
    code, out, _ = longwave("compare", *files, "--json")
    assert code == 0
    assert [one["verdict"] for one in json.loads(out[-1])["rows"]] == ["unjudged", "same"]
    assert "unjudged: of fewer than 3 rounds (--repeats)" in out


def spoil(*keys: Any, value: Any) -> Callable[[dict[str, Any]], object]:
    """Sets what lies under these keys."""

    def change(plain: dict[str, Any]) -> None:
        for key in keys[:-1]:
            plain = plain[key]
        plain[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (spoil("kind", value="ops"), "one is of bench inference, the other of bench ops"),
        (spoil("options", "dtype", value="bf16"), "not comparable: dtype = fp32 and bf16"),
        (spoil("options", "heads", value=3), "not comparable: heads = None and 3"),
        (spoil("models", "llama", "parameters", value=999), "llama is 12F of 1,000 parameters and 12F of 999"),
        (spoil("rows", value=[row(context=5).plain()]), "no row in common"),
        (spoil("version", value=2), "b.json has version 2; this longwave reads version 1"),
        (spoil("format", value="other"), "b.json was not written by longwave bench ... --save"),
        (spoil("rows", value=3), "b.json is damaged"),
        (spoil("rows", 0, "seconds", value={}), "b.json is damaged"),
        (spoil("rows", 0, "seconds", "low", value=7.0), "b.json is damaged"),
        (spoil("hardware", value=None), "b.json is damaged"),
        (spoil("rows", value=[row((1.0, 1.0)).plain()]), "b.json: 2 repeats; a verdict needs the spread of 3 or more"),
        (spoil("rows", value=[]), "b.json: 0 repeats"),
    ],
)
def test_what_cannot_be_compared_is_one_line(longwave, change: Any, says: str, tmp_path: Path):
    code, out, line = longwave("compare", kept(tmp_path / "a.json"), kept(tmp_path / "b.json", change))
    assert (code, out) == (2, [])
    assert line.startswith("longwave: ")
    assert says in line


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000, b'{"rows": []}'])
def test_another_file_is_refused(content: bytes, tmp_path: Path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.json was not written by longwave bench"):
        read(tmp_path / "x.json")


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_that_was_asked_for(longwave, model: Path, tmp_path: Path):
    files = {name: tmp_path / "new" / f"{name}.json" for name in ("save", "profile")}
    wanted = [word for name, path in files.items() for word in (f"--{name}", path)]
    sizes = ["--contexts", "24,32", "--batch", "1,2", "--decode-steps", "4", "--repeats", "3", "--threads", "1"]
    run = ["inference", model, "--against", "none", *sizes, *wanted, "--plot", tmp_path / "plot.png", "--json"]
    code, out, _ = longwave(*run)
    assert code == 0
    assert json.loads(out[-1]) == json.loads(files["save"].read_text())
    assert json.loads(out[-1])["hardware"]["threads"] == 1
    names = [event["name"] for event in ranges(files["profile"])]
    assert {"prefill, 32 tokens, batch 1: tiny", "decode, 32 tokens, batch 2: tiny"} <= set(names)
    assert names.count("blocks.0.mixer") == 1 + 4  # a prefill and four steps
    assert (tmp_path / "plot.png").stat().st_size > 1000
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        *("new", "plot.png", "profile.json", "save.json", "tiny.toml")
    ]
    assert longwave("compare", files["save"], files["save"])[0] == 0
    scaled = json.loads(files["save"].read_text())
    for one in scaled["rows"]:
        one["seconds"] = {name: 9 * value for name, value in one["seconds"].items() if name != "all"} | {"all": [1] * 3}
    (tmp_path / "later.json").write_text(json.dumps(scaled))
    assert longwave("compare", files["save"], tmp_path / "later.json")[0] == 1


def test_the_same_figures_but_for_time(longwave, model: Path):
    sizes = ["--contexts", "24", "--repeats", "1"]
    for run in (["training", model, "--against", "none", *sizes], ["ops", model, *sizes, "--dtype", "bf16"]):
        first, second = (json.loads(longwave(*run, "--json")[1][-1]) for _ in range(2))
        for plain in (first, second):
            for one in plain["rows"]:
                for name in ("seconds", "tokens_per_second", "mfu", "mbu", "of_bound", "gain_of_bound", "ratio"):
                    del one[name]
        assert first == second
        assert first["rows"][0]["peak_memory"] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["speed"], ["speed", "inference", "compare"]),
        (["inference"], ["model"]),
        (["inference", "nowhere.toml"], ["nowhere.toml"]),
        (["inference", "MODEL", "--contexts", "many"], ["many", "64k"]),
        (
            ["inference", "MODEL", "--contexts", "64", "--against", "none"],
            ["96 tokens with decoding", "context_window is 64"],
        ),
        (["inference", "MODEL", "--contexts", "24", "--against", "nowhere"], ["nowhere"]),
        (["inference", "MODEL", "--contexts", "24", "--batch", "0"], ["'0'"]),
        (["inference", "MODEL", "--contexts", "24", "--decode-steps", "0"], ["decode_steps = 0"]),
        (["inference", "MODEL", "--threads", "0"], ["threads = 0", "1 to"]),
        (["inference", "MODEL", "--contexts", "24", "--against", "transformers"], ["layout", "subllm"]),
        (["training", "MODEL", "--retention", "forced"], ["--retention"]),
        (["ops", "--heads", "5", "--kv-heads", "2"], ["kv_heads = 2 does not divide heads = 5"]),
        (["ops", "--head-size", "wide"], ["wide", "--head-size"]),
        (["ops", "--ops", "attention,flash"], ["flash does not exist", "cross_entropy"]),
        (["ops", "nowhere"], ["nowhere"]),
        (["ops", "--save", "FOLDER"], ["is a folder"]),
        (["ops", "--save", "MODEL/x.json"], ["nothing can be written to"]),
        (["ops", "--plot", "x.bmp"], ["x.bmp", ".svg or .png"]),
        (["compare", "MODEL"], ["after"]),
        (["compare", "MODEL", "MODEL"], ["tiny.toml was not written by longwave bench"]),
        (["compare", "nowhere.json", "MODEL"], ["nowhere.json: No such file"]),
        (["compare", "FOLDER", "MODEL"], ["directory"]),
    ],
)
def test_mistakes_are_one_line(longwave, model: Path, arguments: list[str], says: list[str]):
    places = {"MODEL": str(model), "FOLDER": str(model.parent), "MODEL/x.json": f"{model}/x.json"}
    code, out, line = longwave(*(places.get(one, one) for one in arguments))
    assert (code, out) == (2, [])
    assert line.startswith("longwave: ")
    assert [word for word in says if word not in line] == []


def test_a_threshold_is_a_share(longwave, tmp_path: Path):
    same = kept(tmp_path / "a.json")
    code, _, line = longwave("compare", same, copy.copy(same), "--threshold", "5")
    assert (code, line) == (2, "longwave: threshold = 5.0: a share, at least 0 and below 1, such as 0.05")
