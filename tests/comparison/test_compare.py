"""Comparisons: the same to the bit however they are cut, and what their intervals allow to be said."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from runs import MODELS, write_recipe

import longwave as lw
from longwave import files as lw_files
from longwave.benchmarks.measure.roofline import Peaks
from longwave.comparison.budgets import Budget, budgets
from longwave.comparison.grid import Grid, choose
from longwave.comparison.processes import run_all
from longwave.comparison.results import Result, read_result, write_result
from longwave.comparison.runs import Candidate, Line, Plan, Setting
from longwave.comparison.summary import said, summarised
from longwave.comparison.worker import train_line
from longwave.errors import MachineError, UserError
from longwave.intervals import Interval
from longwave.training.clock import Seconds

STEP = 256  # tokens of an optimizer step of the tiny recipes
SELDOM = ["training.evaluate_every=1000", "training.checkpoint_every=1000"]
WSD = ["schedule.kind=wsd", "schedule.decay_fraction=0.25"]


@pytest.fixture(scope="module", autouse=True)
def timed_briefly() -> Iterator[None]:
    """Models are timed with as little as that takes; how well is for the tests of the benchmarks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("longwave.comparison.speed.REPEATS", 1)
        patched.setattr("longwave.comparison.speed.DECODE_STEPS", 4)
        patched.setattr("longwave.comparison.speed.measure_peaks", lambda *_: Peaks(1e10, 1e10))
        patched.setattr("longwave.comparison.compare._PACE_SECONDS", 1.0)
        yield


def recipe_file(folder: Path, model: str) -> Path:
    return write_recipe(
        folder / f"{model.replace(' ', '-')}.toml", model, "adamw", evaluate_every=2, checkpoint_every=3
    )


def plain(result: Result) -> dict[str, Any]:
    """A result without what time passed, and where its data lie."""
    found = dataclasses.asdict(result)
    found["curve"] = [{**point, "seconds": 0} for point in found["curve"]]
    return {**found, "seconds": None, "folder": None, "machine": None, "threads": None}


def line_of(folder: Path, model: str, amounts: str, unit: str = "tokens", overrides: list[str] | None = None) -> Line:
    source = recipe_file(folder, model)
    asked = {"tokens": None, "flops": None, "minutes": None, unit: amounts}
    plan = Plan(folder / "out", [], budgets(**asked))
    return plan.line(Candidate.read(str(source), WSD if overrides is None else overrides), Setting(), 0)


def steps_of(line: Line) -> tuple[list[Result], int]:
    """The results of a line, and how many steps were run for them."""
    told = []
    return train_line(line, lambda _, entry: told.append(entry)), len(told)


# Several budgets ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model", [pytest.param(one, marks=pytest.mark.slow) if one == "around a hybrid" else one for one in MODELS]
)
def test_budgets_of_one_stable_phase_are_points_of_one_run_to_the_bit(model: str, tmp_path: Path) -> None:
    """With a decay of a quarter, whose first step is at the full rate, 8, 12 and 16 steps share 7, then 10."""
    amounts = f"{8 * STEP},{12 * STEP},{16 * STEP}"
    (tmp_path / "one").mkdir()
    found, steps = steps_of(line_of(tmp_path / "one", model, amounts))
    assert [one.steps for one in found] == [8, 12, 16]
    assert steps == 8 + (12 - 7) + (16 - 10)
    (tmp_path / "alone").mkdir()
    [alone], _ = steps_of(line_of(tmp_path / "alone", model, amounts.split(",")[-1]))
    assert plain(alone) == plain(found[-1])


def test_budgets_in_flops_share_their_beginning_too(tmp_path: Path) -> None:
    step = line_of(tmp_path, "causal", "2048").runs[0].recipe.step_flops
    amounts = f"{8.0 * step},{16.0 * step}"
    (tmp_path / "one").mkdir()
    found, steps = steps_of(line_of(tmp_path / "one", "causal", amounts, "flops"))
    assert steps < found[0].steps + found[1].steps
    (tmp_path / "alone").mkdir()
    assert plain(steps_of(line_of(tmp_path / "alone", "causal", amounts.split(",")[1], "flops"))[0][0]) == plain(
        found[1]
    )


def test_schedules_share_what_is_the_same_in_them(tmp_path: Path) -> None:
    found, steps = steps_of(line_of(tmp_path, "llama", f"{8 * STEP},{12 * STEP}", overrides=[]))
    assert [one.steps for one in found] == [8, 12]
    assert steps == 8 + (12 - 3)  # a warm-up of two steps and the first at the full rate are the same for every length


def test_a_finished_run_gives_nothing_to_a_larger_budget_that_comes_later(tmp_path: Path) -> None:
    """Its checkpoint lies in its decay, where the longer run would not be."""
    steps_of(line_of(tmp_path, "llama", f"{8 * STEP}"))
    found, steps = steps_of(line_of(tmp_path, "llama", f"{8 * STEP},{12 * STEP}"))
    assert steps == 12
    (tmp_path / "alone").mkdir()
    assert plain(steps_of(line_of(tmp_path / "alone", "llama", f"{12 * STEP}"))[0][0]) == plain(found[1])


# Whole comparisons --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Two models, two seeds, a grid: run once for all that only look at it."""
    folder = tmp_path_factory.mktemp("compared")
    recipes = [recipe_file(folder, model) for model in ("llama", "causal")]
    found = lw.compare(
        recipes, output=folder / "out", tokens=8 * STEP, seeds=(0, 1), grid="optimizer.lr=1e-3,1e-2,1e-1", jobs=2
    )
    return folder, found


def test_every_run_is_there_and_the_best_rate_is_taken(done: tuple[Path, Any]) -> None:
    folder, found = done
    assert [(row.model, row.seeds) for row in found.rows] == [("llama", (0, 1)), ("causal", (0, 1))]
    for choice in found.choices:
        losses = dict(zip(choice.values, choice.losses, strict=True))
        assert min(losses.values()) == losses[choice.best]
        assert len(choice.values) == 4 if choice.at_edge else 3
    assert {dict(one.setting)["optimizer.lr"] for one in found.results} == {one.best for one in found.choices}
    [llama, causal] = found.rows
    losses = {(one.model, one.seed): one.loss for one in found.results}
    expected = [losses["causal", seed] / losses["llama", seed] - 1 for seed in (0, 1)]
    assert causal.gap.mean == pytest.approx(sum(expected) / 2)
    assert llama.gap is None
    assert json.loads((folder / "out" / "comparison.json").read_text())["measure"] == "loss"


def test_the_models_are_timed_and_the_page_and_the_files_have_it(done: tuple[Path, Any]) -> None:
    folder, found = done
    kinds = ["prefill", "decode", "training", "memory"]
    assert [row.kind for row in found.speed.rows] == kinds
    assert list(found.speed.columns) == ["llama", "causal"]
    kept = json.loads((folder / "out" / "comparison.json").read_text())["speed"]
    assert [row["kind"] for row in kept["rows"]] == kinds
    assert "Per token, after" in (folder / "out" / "report.html").read_text(encoding="utf8")
    best = found.choices[0].best
    times = json.loads((folder / "out" / "speed.json").read_text())
    model = next((folder / "out" / "runs" / "llama" / f"lr={best}" / "seed-0").iterdir()) / "model"
    assert times["models"]["llama"] == lw_files.checksums(model)


def test_the_same_command_again_trains_nothing(done: tuple[Path, Any]) -> None:
    folder, found = done
    before = {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("*")}
    recipes = [folder / "llama.toml", folder / "causal.toml"]
    again = lw.compare(
        recipes, output=folder / "out", tokens=8 * STEP, seeds=(0, 1), grid="optimizer.lr=1e-3,1e-2,1e-1", jobs=2
    )
    assert again == found
    assert {path: path.stat().st_mtime_ns for path in (folder / "out" / "runs").rglob("*")} == before


def test_results_alone_make_the_same_comparison(done: tuple[Path, Any], tmp_path: Path, longwave: Any) -> None:
    """From the whole folder, and from copies of the files of the best settings."""
    folder, found = done
    whole = lw.compare_results([folder / "out"], output=tmp_path / "whole")
    assert whole == found
    for number, result in enumerate(found.results):
        (tmp_path / str(number)).mkdir()
        write_result(result, tmp_path / str(number))
    files = [str(tmp_path / str(number) / "result.json") for number in range(len(found.results))]
    chosen = longwave("compare", *(f"--from={file}" for file in files), "--output", str(tmp_path / "chosen"))
    assert chosen.code == 0
    assert found.statements[0].text in chosen.out
    assert all(len(Path(file).read_bytes()) < 100_000 for file in files)


def test_folders_already_trained_are_compared_as_they_are(done: tuple[Path, Any], tmp_path: Path) -> None:
    folder, found = done
    runs = [next((folder / "out" / "runs" / row.model).glob(f"*{row.setting.split(' = ')[1]}")) for row in found.rows]
    trained = [next((run / "seed-0").iterdir()) for run in runs]
    compared = lw.compare(trained, output=tmp_path)
    theirs = [next(one.loss for one in found.results if (one.model, one.seed) == (row.model, 0)) for row in found.rows]
    assert [one.loss for one in compared.results] == theirs
    with pytest.raises(UserError, match=r"a finished run of 2\.05 k tokens and .* FLOPs, not of 4 k tokens"):
        lw.compare(trained, tokens="4k", output=tmp_path)


def test_minutes_become_steps_once_and_stay(tmp_path: Path) -> None:
    source = recipe_file(tmp_path, "llama")
    first = lw.compare([source], SELDOM, output=tmp_path / "out", minutes=0.05, jobs=2)
    setup = json.loads((tmp_path / "out" / "setup.json").read_text())
    assert first.results[0].steps == max(1, round(3 / setup["pace"]["llama"])) > 2
    assert lw.compare([source], SELDOM, output=tmp_path / "out", minutes=0.05, jobs=2) == first
    assert json.loads((tmp_path / "out" / "setup.json").read_text()) == setup


# Days on which something goes wrong ---------------------------------------------------------------------------------


def killed_in_training(words: list[str], output: Path, pause: float) -> bool:
    """Starts a comparison and kills it a while after it has gone on with its runs; False if it ended before."""
    before = progress(output)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while process.poll() is None and progress(output) == before:
        time.sleep(0.02)
    try:
        process.wait(pause)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    assert process.returncode == 0
    return False


def progress(output: Path) -> dict[Path, int]:
    """What the runs have written so far: logs, which grow with every step, and results."""
    files = [path for kind in ("metrics.jsonl", "result.json") for path in output.rglob(kind)]
    return {path: path.stat().st_size for path in files if path.exists()}


def kills(folder: Path, tokens: str, output: Path, left: int, draws: random.Random) -> int:
    """Runs a comparison to its end, killed up to `left` times on the way; the number of kills."""
    recipes = [str(folder / f"{model}.toml") for model in ("llama", "causal")]
    words = [sys.executable, "-m", "longwave", "compare", *recipes, "--tokens", tokens]
    words += ["--seeds", "0,1", "--output", str(output), "--jobs", "2", *WSD]
    done = 0
    while done < left and killed_in_training(words, output, draws.uniform(0, 1.5)):
        done += 1
    subprocess.run(words, check=True, capture_output=True)
    return done


def straight(folder: Path, tokens: str) -> list[dict[str, Any]]:
    """The results of the same comparison, which nothing disturbed; with as many threads, or its last bits differ."""
    recipes = [recipe_file(folder, model) for model in ("llama", "causal")]
    found = lw.compare(recipes, WSD, output=folder / "straight", tokens=tokens, seeds=(0, 1), jobs=2)
    return [plain(one) for one in found.results]


@pytest.mark.parametrize(
    ("count", "steps"),
    [(1, 24), pytest.param(50, 240, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])],
)
def test_a_comparison_killed_at_random_gives_the_same_numbers(count: int, steps: int, tmp_path: Path) -> None:
    tokens = f"{steps * STEP},{steps * STEP * 4 // 3}"
    draws, expected, done = random.Random(count), sorted(map(str, straight(tmp_path, tokens))), 0
    while done < count:
        output = tmp_path / f"killed-{done}"
        done += kills(tmp_path, tokens, output, count - done, draws)
        assert sorted(str(plain(read_result(path))) for path in output.rglob("result.json")) == expected
    assert done == count


def test_ctrl_c_saves_every_run_and_the_command_goes_on(tmp_path: Path) -> None:
    recipe_file(tmp_path, "causal")
    words = [sys.executable, "-m", "longwave", "compare", str(tmp_path / "causal.toml"), "--tokens", f"{4000 * STEP}"]
    words += ["--output", str(tmp_path / "out"), "--seeds", "0,1", "--jobs", "2", "training.checkpoint_every=100000"]
    process = subprocess.Popen(
        words,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    logs = [tmp_path / "out" / "runs" / "causal" / "as-written" / f"seed-{seed}" for seed in (0, 1)]
    until = time.monotonic() + 60
    while time.monotonic() < until and not all(list(log.glob("*/metrics.jsonl")) for log in logs):
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().endswith("the same command continues")
    assert all(list(log.glob("*/checkpoints/step-*")) for log in logs)


def _die(report: Callable[..., None]) -> None:
    report("working")
    os.kill(os.getpid(), signal.SIGKILL)


def _refuse(report: Callable[..., None]) -> None:
    raise UserError("field = value: what would do")


def _square(number: int, report: Callable[..., None]) -> int:
    report(number)
    return number * number


def test_tasks_give_their_results_in_order_and_tell_how_far_they_are() -> None:
    told: list[tuple[int, int]] = []
    tasks = [partial(_square, number) for number in range(5)]
    assert run_all(tasks, ["task"] * 5, 2, 1, lambda *content: told.append(content)) == [0, 1, 4, 9, 16]
    assert sorted(told) == [(number, number) for number in range(5)]


@pytest.mark.parametrize(
    ("task", "kind", "message"),
    [
        (_die, MachineError, r"the task: its process was killed \(SIGKILL\), as a system out of memory does"),
        (_refuse, UserError, "^field = value: what would do$"),
    ],
)
def test_a_task_that_fails_ends_all_with_its_line(task: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run_all([task], ["the task"], 2, 1, lambda *_: None)


# What may be said ---------------------------------------------------------------------------------------------------


def result(model: str, seed: int, loss: float | None, **changes: Any) -> Result:
    """A finished run as a file might hold it."""
    template = {
        "format": 1,
        "model": model,
        "setting": {},
        "seed": seed,
        "budget": Budget("flops", 1e9),
        "recipe": {"training": {"window": 64, "batch_windows": 4}},
        "layout": "2F",
        "parameters": 10,
        "steps": 4,
        "tokens": 1024,
        "flops": 10**9,
        "seconds": Seconds(60.0, 1.0, 1.0),
        "threads": 1,
        "loss": loss,
        "bits_per_byte": None if loss is None else loss / 2,
        "training_loss": None,
        "retention": (),
        "curve": (),
        "levels": (),
        "data": {"tokenizer": "a", "tokens": "b"},
        "machine": {},
        "ended": "" if loss is not None else "diverged",
    }
    return Result(**{**template, **changes})


@pytest.mark.parametrize(
    ("ours", "text", "verdict"),
    [
        ((3.94, 4.33, 4.84), "B is 1.0% to 1.9% lower than A at equal FLOPs (3 seeds).", "better"),
        ((4.06, 4.47, 4.98), "B is 1.4% to 1.7% higher than A at equal FLOPs (3 seeds).", "worse"),
        ((4.02, 4.38, 4.91), "B and A are not told apart at equal FLOPs (3 seeds): -1.1% to +1.3%.", "same"),
        ((3.9,), "B is 2.5% lower than A at equal FLOPs (1 seed); no interval, so it can be chance.", "unknown"),
        ((3.9, None, 4.8), "B and A cannot be compared at equal FLOPs: 1 of the runs diverged.", "unknown"),
    ],
)
def test_a_sentence_for_what_the_interval_allows(ours: tuple[float | None, ...], text: str, verdict: str) -> None:
    runs = [result("A", seed, loss) for seed, loss in enumerate((4.0, 4.4, 4.9))]
    runs += [result("B", seed, loss) for seed, loss in enumerate(ours)]
    [statement] = summarised(runs).statements
    assert (statement.text, statement.verdict) == (text, verdict)


def test_an_interval_that_touches_zero_tells_nothing_apart() -> None:
    assert said("B", "A", Interval(-0.01, -0.02, 0.0), "x").verdict == "same"


def test_other_tokenizers_are_compared_in_bits_per_byte_only() -> None:
    other = {"tokenizer": "c", "tokens": "d"}
    runs = [result("A", 0, 4.0), result("A", 1, 4.2)]
    runs += [result("B", seed, loss, data=other, bits_per_byte=loss / 4) for seed, loss in ((0, 4.1), (1, 4.3))]
    found = summarised(runs)
    assert found.measure == "bits_per_byte"
    assert found.rows[1].gap is not None
    assert found.rows[1].gap.mean == pytest.approx((4.1 / 4 / 2.0 + 4.3 / 4 / 2.1) / 2 - 1)
    assert "different tokenizers" in found.notes[0]
    assert "in bits per byte" in found.statements[0].text


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"data": {"tokenizer": "a", "tokens": "other"}}, "did not see the same tokens in the same order"),
        ({"recipe": {"training": {"window": 32, "batch_windows": 8}}}, "did not see the same tokens in the same order"),
        ({"threads": 2}, "different numbers of threads"),
        ({"seed": 7}, "The models have different seeds"),
    ],
)
def test_what_weakens_a_comparison_is_noted(changes: dict[str, Any], note: str) -> None:
    runs = [result("A", seed, 4.0 + seed / 10) for seed in (0, 1)]
    runs += [result("B", 0, 4.1), result("B", **{"seed": 1, "loss": 4.2, **changes})]
    assert any(note in one for one in summarised(runs).notes)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([], "no results"),
        ([result("A", 0, 4.0), result("A", 0, 4.1)], "two results of this run"),
        ([result("A", 0, 4.0), result("B", 0, 4.1, budget=Budget("tokens", 5))], "budgets in flops and in tokens"),
        ([result("A", 0, 4.0, setting={"lr": 1}), result("A", 1, 4.1, setting={"lr": 2})], "results of 2 settings"),
    ],
)
def test_results_that_make_no_comparison_are_refused(runs: list[Result], message: str) -> None:
    with pytest.raises(UserError, match=message):
        summarised(runs)


# Grids --------------------------------------------------------------------------------------------------------------


def tried(losses: dict[float, float | None]) -> list[Result]:
    return [result("A", 0, loss, setting={"optimizer.lr": value}) for value, loss in losses.items()]


@pytest.mark.parametrize(
    ("losses", "best", "at_edge"),
    [
        ({1e-3: 4.2, 2e-3: 4.0, 4e-3: 4.1}, 2e-3, False),
        ({4e-3: 4.1, 1e-3: 4.2, 2e-3: 4.0}, 2e-3, False),
        ({1e-3: 4.0, 2e-3: 4.1, 4e-3: 4.2}, 1e-3, True),
        ({1e-3: 4.2, 2e-3: 4.1, 4e-3: 4.0}, 4e-3, True),
        ({1e-3: 4.2, 2e-3: 4.1, 4e-3: None}, 2e-3, False),
    ],
)
def test_the_best_of_a_grid_and_whether_it_lies_at_the_edge(
    losses: dict[float, float | None], best: float, at_edge: bool
) -> None:
    found = choose("A", "optimizer.lr", tried(losses))
    assert (found.best, found.at_edge) == (best, at_edge)


def test_a_grid_on_which_every_run_diverged_is_refused() -> None:
    with pytest.raises(UserError, match="A diverged at every value"):
        choose("A", "optimizer.lr", tried({1e-3: None, 2e-3: None}))


@pytest.mark.parametrize(
    ("text", "value", "beyond"),
    [
        ("optimizer.lr=1e-3,2e-3,8e-3", 1e-3, 5e-4),
        ("optimizer.lr=1e-3,2e-3,8e-3", 8e-3, 3.2e-2),
        ("optimizer.lr=1e-3,2e-3,8e-3", 2e-3, None),
        ("optimizer.kind=adamw,scaled_adam", "adamw", None),
        ("subllm.bypass_floor=0,0.5", 0, None),
    ],
)
def test_a_grid_is_widened_by_the_ratio_at_its_edge(text: str, value: Any, beyond: float | None) -> None:
    found = Grid.parse(text).beyond(value)
    assert (None if found is None else found.value) == beyond


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give recipes to compare, or --from with results"),
        (("llama.toml",), "budget: give one of --tokens, --flops and --minutes"),
        (("llama.toml", "--tokens=1k", "--flops=1e9"), "budget: give one of"),
        (("llama.toml", "--tokens=-1"), "'-1' is no amount above 0; write 2.5M, 3e13 or 20"),
        (("llama.toml", "--tokens=256"), "schedule.warmup_steps = 2: a run of 1 step"),
        (("llama.toml", "--tokens=10k", "--seeds=0,0"), "--seeds: [0] stands there twice"),
        (("llama.toml", "--tokens=10k", "--seeds=a"), "--seeds 'a': numbers with commas between"),
        (("llama.toml", "--tokens=10k", "--jobs=0"), "--jobs 0: 1 to"),
        (("llama.toml", "--tokens=10k", "--grid=optimizer.lr"), "--grid optimizer.lr: reads key.path=value,value"),
        (("llama.toml", "--tokens=10k", "--grid=optimizer.lr=1"), "give two values or more"),
        (("llama.toml", "--tokens=10k", "--grid=optimizer.nope=1,2"), "unknown key optimizer.nope"),
        (("llama.toml", "llama.toml", "--tokens=10k"), "llama: two recipes of this name"),
        (("absent.toml", "--tokens=10k"), "absent.toml: neither a file nor the name of a recipe"),
        ((".", "--tokens=10k"), "holds no run of `longwave train`"),
        (("--from=absent.json",), "absent.json: no such file or directory"),
        (("--from=.",), "no result.json in it"),
        (("--from=llama.toml",), "llama.toml: no result of a run"),
        (("llama.toml", "--from=."), "--from: results take the place of runs; leave out RECIPE"),
        (("--tokens=1k", "--jobs=2", "--from=."), "leave out --jobs and --tokens"),
    ],
)
def test_mistakes_get_one_line(words: tuple[str, ...], message: str, tmp_path: Path, monkeypatch, longwave) -> None:
    recipe_file(tmp_path, "llama")
    monkeypatch.chdir(tmp_path)
    found = longwave("compare", *words)
    assert found.code == 2
    assert message in found.err
    assert found.err.count("\n") <= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama.toml"]


def test_a_result_of_another_recipe_is_not_taken_for_this_one(tmp_path: Path) -> None:
    line = line_of(tmp_path, "llama", f"{4 * STEP}", overrides=[])
    train_line(line, lambda *_: None)
    with pytest.raises(
        UserError, match=r"a finished run of another comparison \(optimizer\.lr = 0\.003 there, 0\.01 here\)"
    ):
        train_line(line_of(tmp_path, "llama", f"{4 * STEP}", overrides=["optimizer.lr=0.01"]), lambda *_: None)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path, longwave, monkeypatch) -> None:
    recipe_file(tmp_path, "causal")
    monkeypatch.chdir(tmp_path)
    words = ("--tokens", f"{8 * STEP},{16 * STEP}", "--seeds=0,1,2", "--grid=optimizer.lr=1e-3,3e-3", "--dry-run")
    found = longwave("compare", "causal.toml", *words, "--json")
    assert found.code == 0
    assert [(one["model"], one["runs"], one["steps"]) for one in found.json["models"]] == [
        ("causal", 3, 8),
        ("causal", 4, 16),
    ]
    assert found.json["flops"] == sum(one["runs"] * one["flops"] for one in found.json["models"])
    assert found.json["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["causal.toml"]
