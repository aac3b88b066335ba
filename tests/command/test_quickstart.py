"""`longwave quickstart`: a comparison of three models from text to a page, which goes on wherever it was stopped."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import runs
from command_line import shell
from runs import StopAt, losses

from longwave import files
from longwave import quickstart as quick_module
from longwave.benchmarks.measure.others import OtherWork
from longwave.benchmarks.measure.roofline import Peaks
from longwave.cli import main
from longwave.errors import UserError

NAMES = {"llama": "Llama", "subllm": "SUBLLM", "sala": "SALA"}
SHORT = [
    *("training.steps=4", "training.batch_windows=2", "training.window=64", "training.checkpoint_every=2"),
    *("training.evaluate_every=2", "training.evaluate_windows=2", "training.log_every=1", "schedule.warmup_steps=1"),
    *("model.hidden_size=32", "model.attention.heads=2", "model.mlp.size=32", "model.vocab_size=300"),
    "model.context_window=128",
]


@pytest.fixture(scope="module")
def quick():
    """Quickstart with as little timing as it can do; how well it times is for the tests of the benchmarks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("longwave.comparison.speed.REPEATS", 1)
        patched.setattr("longwave.comparison.speed.DECODE_STEPS", 4)
        patched.setattr("longwave.comparison.speed.measure_peaks", lambda *_: Peaks(1e10, 1e10))
        patched.setattr("longwave.comparison.compare._ROUGH_SECONDS", 0.0)
        patched.setattr("longwave.quickstart._NEW_TOKENS", 8)
        patched.setattr("longwave.quickstart._GROWTH_SECONDS", 0.1)
        patched.setattr("longwave.quickstart.MEASURED", (64, 128))
        patched.setattr("longwave.quickstart.COMPUTED", (256,))
        yield


def logs(output: Path) -> list[list[dict[str, Any]]]:
    return [losses(output / name) for name in NAMES]


@pytest.fixture(scope="module")
def compared(quick, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison."""
    output = tmp_path_factory.mktemp("quickstart") / "out"
    assert main(["quickstart", str(runs.corpus()), "--output", str(output), *SHORT]) == 0
    return output


@pytest.mark.slow
def test_quickstart_in_a_process_of_its_own_with_everything_measured(tmp_path: Path):
    result = shell("quickstart", runs.corpus(), "--output", tmp_path / "out", *SHORT, "--json")
    assert result.returncode == 0, result.stderr
    assert "this will take about" in result.stderr.split("step 1/4")[0]
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures == json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["kind"] for row in figures["speed"]] == ["prefill", "decode", "training", "memory"]
    assert (tmp_path / "out" / "report.html").exists()


def test_quickstart_leaves_models_metrics_and_a_report(compared: Path):
    for name in NAMES:
        assert files.verify(compared / name / "model")
    figures = json.loads((compared / "results.json").read_text())
    logged = [json.loads(line) for line in (compared / "metrics.jsonl").read_text().splitlines()]
    assert [(entry["model"], entry["step"]) for entry in logged] == [
        (model, step) for model in NAMES for step in range(1, 5)
    ]
    found = figures["held_out_loss"]
    assert list(found) == [*NAMES.values()]
    gaps = {model: found[model] / found["Llama"] - 1 for model in ("SUBLLM", "SALA")}
    assert figures["relative_gap"] == pytest.approx(gaps)
    assert {model: len(levels) for model, levels in figures["retention"].items()} == {"SUBLLM": 2}
    assert [row["kind"] for row in figures["speed"]] == ["prefill", "decode", "training", "memory"]
    assert all({"transformers", *NAMES.values()} < row.keys() for row in figures["speed"])
    assert {model: points[0]["tokens"] for model, points in figures["growth"].items()} == dict.fromkeys(found, 64)
    page = (compared / "report.html").read_text(encoding="utf8")
    assert f"{figures['held_out_loss']['SUBLLM']:.3f}" in page
    assert "<html" in page
    assert page.rstrip().endswith("</html>")


def test_quickstart_run_again_trains_no_further(longwave, compared: Path):
    before, first = logs(compared), json.loads((compared / "results.json").read_text())
    weights = (compared / "subllm" / "model" / "model.safetensors").stat().st_mtime_ns
    again = longwave("quickstart", "--output", compared, runs.corpus(), *SHORT, "--json")
    assert again.code == 0, again.err
    assert logs(compared) == before
    assert (compared / "subllm" / "model" / "model.safetensors").stat().st_mtime_ns == weights
    for figure in ("held_out_loss", "relative_gap", "retention", "training_selection_loss"):
        assert again.json[figure] == first[figure]


def test_quickstart_times_the_models_once_and_again_where_it_is_asked_to(longwave, compared: Path, monkeypatch):
    words, timed = ["quickstart", "--output", compared, runs.corpus(), *SHORT, "--json"], []
    times = quick_module.time_models
    monkeypatch.setattr(
        "longwave.quickstart.time_models", lambda *given, **named: timed.append(1) or times(*given, **named)
    )
    first = longwave(*words)
    assert "as measured" in first.err
    assert "--measure-again` measures it again" in first.err
    again = longwave(*words, "--measure-again")
    assert timed == [1]
    assert again.json["speed"] != first.json["speed"]
    assert longwave(*words).json["speed"] == again.json["speed"]


def test_quickstart_takes_a_text_whose_name_is_not_utf8(tmp_path: Path):
    text = tmp_path / "text-\udcff"
    shutil.copytree(runs.corpus(), text)
    first, again = (quick_module._prepared(str(text), tmp_path / "out" / "data", SHORT) for _ in range(2))
    assert first == again
    with pytest.raises(UserError, match=r"made of .*; give another --output"):
        quick_module._prepared(str(runs.corpus()), tmp_path / "out" / "data", SHORT)


def test_quickstart_notices_that_its_text_has_changed(longwave, refuses, compared: Path, tmp_path: Path):
    shutil.copytree(runs.corpus(), tmp_path / "text")
    shutil.copytree(compared, tmp_path / "out")
    note = tmp_path / "out" / "source.txt"
    note.write_text(note.read_text().replace(str(runs.corpus()), str(tmp_path / "text")))
    words = ["quickstart", tmp_path / "text", "--output", tmp_path / "out", *SHORT]
    file = next((tmp_path / "text").glob("*.py"))
    content = file.read_text()
    file.write_text(content.swapcase())
    refuses(*words, says=["text: has changed since", "was made of it", "another --output"])
    file.write_text(content)
    assert longwave(*words).code == 0  # a comparison may be moved, too


def test_a_busy_machine_is_told_and_another_measurement_offered(longwave, compared: Path, monkeypatch):
    busy = OtherWork(2, 2, 1.4)
    monkeypatch.setattr("longwave.comparison.speed.other_work", lambda: nullcontext(busy))
    found = longwave("quickstart", "--output", compared, runs.corpus(), *SHORT, "--json", "--measure-again")
    assert "This machine was busy: other processes kept 1.4 of 2 cores busy meanwhile." in found.out
    assert f"`longwave quickstart --output {compared} --measure-again`" in found.out
    assert found.json["machine_was_busy"]
    assert "This machine was busy" in (compared / "report.html").read_text(encoding="utf8")


def test_the_page_tells_the_times_that_passed(compared: Path):
    page = (compared / "report.html").read_text(encoding="utf8")
    for name in NAMES:
        spent = json.loads((compared / name / "times.json").read_text())
        assert f"{spent['training']:.0f} s of training, {spent['evaluation']:.0f} s of evaluation" in page
    assert "of the first 2 held-out windows" in page


def stopping(at: dict[str, int], run: Any, report: object) -> StopAt:
    """An observer in place of the one that tells of a run's steps, which ends a model's training after a step."""
    return StopAt(at.get(run.model, 0))


def test_quickstart_interrupted_goes_on_to_the_same_losses(
    longwave, refuses, compared: Path, tmp_path: Path, monkeypatch
):
    """By a real SIGINT to this process, in the middle of each training."""
    words = ["quickstart", runs.corpus(), "--output", tmp_path / "out", *SHORT]
    for place, step in {"llama": 1, "subllm": 3, "sala": 2}.items():
        with monkeypatch.context() as patched:
            stop = {NAMES[place]: step}
            patched.setattr(
                "longwave.comparison.worker._Reporter", lambda run, _, at=stop: StopAt(at.get(run.model, 0))
            )
            refuses(*words, says=["stopped; every run is saved", "the same command continues"], code=130)
        assert len(losses(tmp_path / "out" / place)) == step
    assert longwave(*words).code == 0
    assert logs(tmp_path / "out") == logs(compared)


def test_quickstart_refuses(refuses, compared: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    refuses("quickstart", tmp_path / "empty", "--output", tmp_path / "out", says=["holds no text"])
    refuses("quickstart", tmp_path / "missing", "--output", tmp_path / "out", says=["no such file or folder"])
    refuses("quickstart", "--output", tmp_path / "out", "trainig.steps=3", says=["trainig", "did you mean training?"])
    refuses("quickstart", "one", "two", says=["'two'", "an override reads key.path=value"])
    assert not (tmp_path / "out").exists()
    refuses("quickstart", tmp_path / "empty", "--output", compared, *SHORT, says=["made of", "another --output"])
    other = ["training.seed=7", "--output", compared]
    refuses(
        "quickstart",
        runs.corpus(),
        *SHORT,
        *other,
        says=["a finished run of another comparison", "training.seed = 0 there"],
    )


@pytest.mark.parametrize(("fast", "precision", "optimizer"), [(True, "bf16", "muon"), (False, "fp32", "adamw")])
def test_a_machine_without_bf16_in_hardware_trains_without_it(monkeypatch, fast: bool, precision: str, optimizer: str):
    monkeypatch.setattr("longwave.machine.fast_bf16", lambda: fast)
    for name in NAMES:
        recipe = quick_module._recipe(name, Path("data"), ())
        assert (recipe.training.precision, recipe.optimizer.kind) == (precision, optimizer)
    assert quick_module._recipe("llama", Path("data"), ["optimizer.kind=scaled_adam"]).optimizer.kind == "scaled_adam"


def test_a_model_that_diverged_ends_it_in_one_line(refuses, quick, tmp_path: Path):
    (tmp_path / "out" / "llama").mkdir(parents=True)  # it has been begun, so that its speed is not measured first
    words = ["quickstart", runs.corpus(), "--output", tmp_path / "out", *SHORT, "optimizer.lr=1e38"]
    for _ in range(2):
        refuses(*words, says=["Llama: ", "optimizer.lr", "another --output"], code=1)
