"""`longwave bench context`: one growing sequence is read, decoded from and rolled back; models are kept apart."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_bench_output import PEAKS, ranges, row

from longwave import machine
from longwave.benchmarks.context import run, sequence
from longwave.benchmarks.context.growth import DECODE, PREFILL, exponents
from longwave.benchmarks.context.options import ContextOptions, dense_twin
from longwave.benchmarks.context.picture import draw_growth
from longwave.benchmarks.context.run import Run
from longwave.benchmarks.context.sequence import Growing, Reading, Stopped
from longwave.benchmarks.context.text import read_text
from longwave.benchmarks.context.worker import Job, Served, Worker, answer
from longwave.benchmarks.measure.checks import one_pass
from longwave.benchmarks.measure.memory import Meter
from longwave.benchmarks.measure.timing import Timing
from longwave.benchmarks.results.results import Model
from longwave.checkpoints import save
from longwave.cli import main
from longwave.config import ModelConfig
from longwave.costs import total
from longwave.data.sources import documents
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.layers.mlp import MLPConfig
from longwave.machine import free_memory
from longwave.mixers import AttentionConfig, LightningConfig, WindowConfig
from longwave.model import Decoder
from longwave.resamplers import SubllmConfig

CPU = torch.device("cpu")
WINDOW = "[model.window]\nsize = 16\n"
LAYOUTS = ["2F", "F W", "F subllm(0.64: F subllm(0.5: F)) W", "F 2L", "L subllm(0.64: L) F"]
OPTIONS = ContextOptions(contexts=(24, 70, 150), chunk=16, decode_steps=4, device="cpu")


def config(layout: str = "2F", vocab_size: int = 300) -> ModelConfig:
    shape, window = AttentionConfig(heads=4, kv_heads=2), WindowConfig(8) if "W" in layout else None
    return ModelConfig(vocab_size, 32, layout, context_window=64, attention=shape, mlp=MLPConfig(48), window=window)


def decoder(layout: str) -> Decoder:
    """Random weights, large enough that logits differ from token to token."""
    model = Decoder(config(layout))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1.0 if "norm" in name or "bypass" in name else 4.0)
    return model.eval()


def growing(layout: str = "2F", options: ContextOptions = OPTIONS, **values: Any) -> Growing:
    ids = torch.randint(0, 300, (options.tokens,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    return Growing(decoder(layout), ids, options, **values)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of a tiny model, beside a text to read."""
    path = tmp_path / "tiny.toml"
    text = '[model]\nvocab_size = 300\nhidden_size = 32\nlayout = "F W subllm(0.64: F)"\ncontext_window = 64\n'
    path.write_text(f"{text}[model.attention]\nheads = 4\nkv_heads = 2\n[model.mlp]\nsize = 48\n{WINDOW}")
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 9)
    return path


@pytest.fixture
def longwave(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, recipe: Path):
    """Runs `longwave bench`: exit code, stdout, stderr. RECIPE, TEXT and FOLDER stand for what there is to read."""
    monkeypatch.setattr(run, "measure_peaks", lambda *_: PEAKS)
    places = {"RECIPE": recipe, "TEXT": recipe.parent / "text.txt", "FOLDER": recipe.parent}

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["bench", *(str(places.get(str(one), one)) for one in arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Models run in this process; which of them came to which context, in order."""
    seen: list[tuple[str, int]] = []

    class Inside(Worker):
        def __init__(self, job: Job, report: Callable[[int], object]) -> None:
            self.name, self._served = job.name, Served(job, report)
            self.load = self._served.load

        def grow(self, context: int) -> Reading:
            seen.append((self.name, context))
            return self._served.grow(context)

        def close(self) -> None:
            return

    monkeypatch.setattr(run, "Worker", Inside)
    monkeypatch.setattr(run, "measure_peaks", lambda *_: PEAKS)
    return seen


# --- the growing sequence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sequence_grows_as_if_nothing_had_been_decoded(layout: str):
    one = growing(layout)
    one.check()
    for context in OPTIONS.contexts:
        found = one.grow(context)
        assert one.state.seen == [context]
        right = one_pass(one.model, one.ids[:context].long(), 1)
        torch.testing.assert_close(one.model.logits(one.hidden), right, rtol=1e-3, atol=1e-3)
        assert len(found.decode) == OPTIONS.decode_steps
        assert 0 < found.used <= found.reserved


@pytest.mark.parametrize("layout", ["2F", "F W", "F 2L"])
def test_figures_are_those_of_the_formulas(layout: str):
    one = growing(layout)
    for context in OPTIONS.contexts:
        found = one.grow(context)
        costs = total(one.model.costs(context))
        assert found.used == found.formula == costs.state_bytes
        assert found.prefill_work.flops == one.model.prefill_flops(context)
        assert found.retention == ()
        after = context + OPTIONS.decode_steps / 2  # the middle of all steps, the one that warms up among them
        flops = sum(part.flops for part in found.decode_work)
        assert flops == pytest.approx(one.model.decode_flops(int(after)), rel=1e-3)


def test_time_to_the_first_token_is_that_of_all_chunks_and_one_head(monkeypatch: pytest.MonkeyPatch):
    heads: list[int] = []
    monkeypatch.setattr(Decoder, "logits", lambda self, hidden: heads.append(len(hidden)) or hidden)

    def seconds_of(task: Callable[[], object]) -> float:
        before = len(heads)
        task()
        return 1000.0 if len(heads) > before else 1.0

    monkeypatch.setattr(sequence, "seconds_of", seconds_of)
    one = growing()
    assert [one.grow(context).first_token for context in OPTIONS.contexts] == [1002.0, 1005.0, 1010.0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_room_is_made_once_for_each_context(layout: str, monkeypatch: pytest.MonkeyPatch):
    one = growing(layout, replace(OPTIONS, contexts=(200, 800)))
    one.grow(200)
    one._make_room(800 + 5)
    unbounded = [store for store in one.state._stores if store.window is None]
    before = [store.reserved_bytes() for store in unbounded]
    found = one.grow(800)
    assert [store.reserved_bytes() for store in unbounded] == before
    assert found.reserved < 1.3 * found.used


def test_forced_retention_is_kept_in_chunks():
    options = replace(OPTIONS, contexts=(600,), retention="forced")
    one = growing(LAYOUTS[2], options)
    one.check()
    assert one.grow(600).retention == pytest.approx((0.64, 0.5), abs=0.02)


@pytest.mark.parametrize(("wrong", "says"), [(0, "prefill in chunks"), (1, "decoding")])
def test_wrong_logits_are_refused(wrong: int, says: str, monkeypatch: pytest.MonkeyPatch):
    def rows(*arguments: Any) -> torch.Tensor:
        found = one_pass(*arguments)
        found[wrong] = -found[wrong]
        return found

    monkeypatch.setattr(sequence, "one_pass", rows)
    with pytest.raises(MachineError, match=f"{says}: its logits are off"):
        growing().check()


def test_a_model_is_stopped_by_time_or_memory_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    one = growing(limit=1e-9)
    with pytest.raises(Stopped, match=r"s had passed at 16 tokens; --limit is 1e-09"):
        one.grow(24)
    one = growing(options=replace(OPTIONS, memory=1000))
    with pytest.raises(Stopped, match=r"29 tokens would take [\d.]+ [KM]iB beyond the weights; --memory is 1000 B"):
        one.grow(24)
    monkeypatch.setattr(sequence, "free_memory", lambda _: 8000)
    with pytest.raises(Stopped, match=r"29 tokens would take 7\.25 KiB more, and 7\.812 KiB are free"):
        growing().grow(24)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_peak_between_two_looks_is_seen():
    meter = Meter(CPU)
    torch.ones(16 << 20)  # 64 MiB, gone at once
    assert 60 << 20 < meter.peak() < 90 << 20
    assert Meter(CPU).peak() < 16 << 20  # what is over is not counted again


def test_a_container_has_less_memory_than_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_CGROUP", tmp_path)
    whole = free_memory(CPU)
    assert whole is not None
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("2000000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\nfile 500000\n")
    assert free_memory(CPU) == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(CPU) == pytest.approx(whole, rel=0.2)


# --- text and the dense twin ------------------------------------------------------------------------------------------


def test_text_is_repeated_where_it_is_short_and_says_so(recipe: Path):
    path = recipe.parent / "text.txt"
    text = read_text(path, None, 300, 1000)
    assert (len(text.ids), text.ids.dtype) == (1000, np.int32)
    assert (text.ids[text.found : 2 * text.found] == text.ids[: text.found]).all()
    assert f"repeated, {1000 / text.found:.1f} times in all" in text.describe()
    few = read_text(path, None, 300, 50)
    assert (few.ids == text.ids[:50]).all()
    assert few.describe() == f"text: 50 tokens of {path}"
    tokenizer = Tokenizer.train((one.text for one in documents(path)), 300)
    assert tokenizer.decode(text.ids[: text.found].tolist()) == path.read_text()
    entries = tokenizer.vocab_size
    with pytest.raises(
        UserError, match=f"the tokenizer has {entries} entries; the model's vocabulary has {entries - 1}"
    ):
        read_text(path, tokenizer, entries - 1, 50)


def test_the_dense_twin_has_full_attention_and_nothing_else():
    sections = {"subllm": SubllmConfig(bypass_steps=7), "lightning": LightningConfig(silu="qk")}
    shape = replace(config("F subllm(0.64: F L) W"), **sections)
    assert Decoder(shape).config == shape
    twin = dense_twin(shape)
    assert (twin.layout, twin.subllm, twin.lightning, twin.window) == ("4F", None, None, None)
    assert replace(twin, layout=shape.layout, tables={**twin.tables, **sections, "window": shape.window}) == shape
    assert Decoder(twin).config == twin


# --- growth -----------------------------------------------------------------------------------------------------------


def rows_of(subject: str, contexts: tuple[int, ...], exponent: float) -> Iterator[Any]:
    for context in contexts:
        place = {"context": context, "batch": 1, "subject": subject, "ratio": None}
        timing = Timing((1e-6 * context**exponent,))
        yield row(quantity=PREFILL, timing=timing, peak_memory=context, **place)
        yield row(quantity=DECODE, timing=timing, state_used=0, **place)


def test_exponents_are_fitted_over_the_points_there_are():
    rows = [*rows_of("square", (1024, 4096, 16384), 2.0), *rows_of("line", (1024, 2048), 1.0)]
    rows += rows_of("alone", (1024,), 1.0)
    found = {(one.subject, one.figure): one for one in exponents(rows)}
    assert found.keys() == {
        (subject, figure)
        for subject in ("square", "line")
        for figure in (PREFILL, "time per decoded token", "peak memory")
    }  # of a state of nothing, and of one point, there is no exponent
    assert found["square", PREFILL].exponent == pytest.approx(2)
    assert found["square", PREFILL].contexts == (1024, 4096, 16384)
    assert found["line", "time per decoded token"].exponent == pytest.approx(1)
    bent = exponents([*rows_of("bent", (1024, 4096), 0.0), *rows_of("bent", (16384,), 0.0)])
    assert bent[0].exponent == pytest.approx(0)


def test_an_exponent_is_of_least_squares_and_the_last_two_are_told_apart():
    values = {1: 1.0, 10: 1.0, 100: 10.0}
    rows = [row(quantity=PREFILL, context=n, timing=Timing((v,)), peak_memory=None) for n, v in values.items()]
    (one,) = exponents(rows)
    assert (one.exponent, one.last) == (pytest.approx(0.5), pytest.approx(1))


# --- both models in turn ----------------------------------------------------------------------------------------------


def results_of(recipe: Path, other: str | None, **values: Any) -> list[run.ContextResults]:
    options = replace(OPTIONS, text=str(recipe.parent / "text.txt"), **values)
    return list(Run(recipe, other, options).results())


def test_models_take_turns_and_later_passes_repeat(recipe: Path, inside: list[tuple[str, int]]):
    *_, found = results_of(recipe, "dense", repeats=3)
    assert inside == [(name, context) for context in OPTIONS.contexts for name in ("tiny", "dense")] * 3
    assert [(one.quantity, one.context, one.subject) for one in found.rows] == [
        (quantity, context, name)
        for context in OPTIONS.contexts
        for quantity in (PREFILL, DECODE)
        for name in ("tiny", "dense")
    ]
    for one in found.rows:
        rounds = 3 if one.quantity == PREFILL else 3 * OPTIONS.decode_steps
        assert len(one.timing.seconds) == rounds
        assert (one.ratio == 1.0) == (one.subject == "dense")
    assert found.models["dense"].layout == "3F"
    assert "tiny: random weights; meant for 64 tokens" in found.notes[1]


def test_a_model_that_stops_is_reported_and_the_other_goes_on(
    recipe: Path, inside: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
):
    grow = Growing.grow

    def stopping(self: Growing, context: int) -> Reading:
        if self.model.config.layout == "3F" and context > 24:
            raise Stopped("enough")
        return grow(self, context)

    monkeypatch.setattr(Growing, "grow", stopping)
    *_, found = results_of(recipe, "dense", repeats=2)
    places = [("tiny", 24), ("dense", 24), ("tiny", 70), ("dense", 70), ("tiny", 150)]
    assert inside == places + [place for place in places if place != ("dense", 70)]
    assert found.stopped == {"dense": "enough"}
    assert [(one.context, one.ratio is None) for one in found.rows if one.quantity == PREFILL] == [
        *((24, False), (24, False), (70, True), (150, True))
    ]
    assert found.plain()["stopped"] == {"dense": "enough"}


def test_where_nothing_was_measured_the_reason_is_given(recipe: Path, inside: list[tuple[str, int]]):
    with pytest.raises(MachineError, match=r"nothing was measured: tiny: 29 tokens would take .* --memory is 1 B"):
        results_of(recipe, None, memory=1)


def test_a_pass_that_was_cut_short_leaves_pairs(recipe: Path, inside: list[tuple[str, int]]):
    found = results_of(recipe, "dense", repeats=2)
    cut = found[len(OPTIONS.contexts) * 2]  # the first model has been at the first context twice, the other once
    assert inside[: len(OPTIONS.contexts) * 2 + 1][-1] == ("tiny", 24)
    assert [len(one.timing.seconds) for one in cut.rows if one.quantity == PREFILL] == [1] * 6


def test_growth_is_drawn_the_same_every_time(recipe: Path, inside: list[tuple[str, int]], tmp_path: Path):
    *_, found = results_of(recipe, "dense")
    for name in ("one.svg", "two.svg"):
        draw_growth(replace(found, stopped={"dense": "enough"}), tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    draw_growth(replace(found, rows=found.rows[:1]), tmp_path / "few.png")
    assert (tmp_path / "few.png").read_bytes().startswith(b"\x89PNG")


# --- processes --------------------------------------------------------------------------------------------------------


def test_a_process_that_dies_is_a_model_that_stops():
    options = replace(OPTIONS, contexts=(24, 1 << 20))
    seen: list[int] = []

    def report(tokens: int) -> None:
        seen.append(tokens)
        if tokens > 100:
            (process,) = multiprocessing.active_children()
            os.kill(process.pid or 0, signal.SIGKILL)

    worker = Worker(Job("tiny", config(), np.zeros(options.tokens, np.int32), options, 1, 1e9), report)
    assert worker.load() == Model("2F", sum(one.numel() for one in Decoder(config()).parameters()))
    assert worker.grow(24).context == 24
    with pytest.raises(Stopped, match=r"was killed \(SIGKILL\) after 1\d\d tokens, as a system out of memory does"):
        worker.grow(1 << 20)
    assert seen[:3] == [16, 24, 40]
    with pytest.raises(Stopped, match="SIGKILL"):
        worker.load()
    worker.close()
    assert multiprocessing.active_children() == []


def test_an_interrupt_is_heard_while_a_process_starts():
    """The job is larger than a pipe: it is taken only once the process has imported torch, seconds later."""
    options, sent = OPTIONS, []

    def interrupt(*_: object) -> None:
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGALRM, interrupt)
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    job = Job("tiny", config(), np.zeros(1 << 20, np.int32), options, 1, 1e9)
    worker = Worker(job, lambda _: None)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    try:
        with pytest.raises(KeyboardInterrupt):
            worker.load()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.signal(signal.SIGINT, heard)
        worker.close()
    assert len(sent) == 1


def test_a_job_of_any_size_does_not_keep_a_process_from_starting():
    """Its start returns at once: what it would wait for, it would wait for with Ctrl-C ignored."""
    started = time.monotonic()
    worker = Worker(Job("tiny", config(), np.zeros(1 << 24, np.int32), OPTIONS, 1, 1e9), lambda _: None)
    taken = time.monotonic() - started
    assert worker.load().layout == "2F"
    assert taken < 0.5 * (time.monotonic() - started)
    worker.close()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UserError("no"), UserError),
        (MachineError("no"), MachineError),
        (Stopped("no"), Stopped),
        (MemoryError("no"), Stopped),
        (torch.OutOfMemoryError("no"), Stopped),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 1 byte"), Stopped),
    ],
)
def test_what_goes_wrong_in_a_process_is_told(error: Exception, kind: type[Exception]):
    def fails() -> None:
        raise error

    found = answer(fails, [])
    assert type(found) is kind
    assert str(error) in str(found)


def test_a_fault_of_our_own_is_no_answer():
    with pytest.raises(RuntimeError, match="size"):
        answer(lambda: torch.ones(2) @ torch.ones(3), [])


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_run_leaves_all_that_was_asked_for(longwave, tmp_path: Path):
    files = {name: tmp_path / "new" / f"{name}.json" for name in ("save", "profile")}
    wanted = [word for name, path in files.items() for word in (f"--{name}", path)]
    sizes = ["--contexts", "64,128,256", "--chunk", "48", "--decode-steps", "4", "--threads", "1", "--text", "TEXT"]
    code, out, err = longwave("context", "RECIPE", *sizes, *wanted, "--plot", tmp_path / "plot.svg", "--json")
    assert code == 0
    assert "dense: up to 256 tokens" in err
    plain = json.loads(out.splitlines()[-1])
    assert plain == json.loads(files["save"].read_text())
    assert {name: model["layout"] for name, model in plain["models"].items()} == {
        "tiny": "F W subllm(0.64: F)",
        "dense": "3F",
    }
    growth = {(one["subject"], one["figure"]): one for one in plain["growth"]}
    assert growth["dense", "state"]["exponent"] == pytest.approx(1)
    assert growth["dense", "state"]["contexts"] == [64, 128, 256]
    assert 0.5 < growth["tiny", "state"]["exponent"] < 0.95  # a window stays as it is
    dense = [one for one in plain["rows"] if one["subject"] == "dense" and one["quantity"] == DECODE]
    assert (
        [one["state_used"] for one in dense]
        == [one["state_formula"] for one in dense]
        == [384 * n for n in (64, 128, 256)]
    )
    text = out.replace("\n", " ")
    assert "repeated" in text
    assert "3 points, 64 - 256" in text
    names = [event["name"] for event in ranges(files["profile"])]
    places = ("the 48 tokens after 256: tiny", "4 steps after 256 tokens: dense", "the 48 tokens after 256: dense")
    assert set(places) <= set(names)
    assert names.count("blocks.0.mixer") == 2 * (1 + 4)
    assert (tmp_path / "plot.svg").stat().st_size > 1000
    code, out, _ = longwave("compare", files["save"], files["save"], "--json")
    assert code == 0
    verdicts = {one["quantity"]: one["verdict"] for one in json.loads(out.splitlines()[-1])["rows"]}
    assert verdicts == {PREFILL: "unjudged", DECODE: "same"}


def test_a_folder_is_read_with_its_own_tokenizer_and_stopped_in_good_time(longwave, recipe: Path):
    folder = recipe.parent / "model"
    save(Decoder(config("F W")), folder, tokenizer=Tokenizer.train(["the text, all of it " * 9], 290))
    size = ["--contexts", "64,1M", "--memory", "100M", "--against", "none", "--text", "TEXT", "--json"]
    code, out, _ = longwave("context", folder, *size)
    assert code == 0
    plain = json.loads(out.splitlines()[-1])
    assert [one["context"] for one in plain["rows"]] == [64, 64]
    assert plain["stopped"].keys() == {"model"}
    assert "1,048,593 tokens would take 1" in plain["stopped"]["model"]
    assert "--memory is 100 MiB" in plain["stopped"]["model"]
    assert "model stopped: 1,048,593 tokens would take" in out
    assert "text: " in plain["notes"][0]
    assert "random weights" not in plain["notes"][1]


def in_group(leader: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:  # it has just ended
            continue
        if int(group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_an_interrupt_keeps_what_is_finished(recipe: Path):
    saved = recipe.parent / "saved.json"
    size = ["--contexts", "64,1M", "--chunk", "64", "--text", str(recipe.parent / "text.txt"), "--against", "none"]
    command = [sys.executable, "-m", "longwave", "bench", "context", str(recipe), *size, "--save", str(saved)]
    started = subprocess.Popen(
        [*command, "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert started.stderr is not None
    while "up to 1,048,576" not in started.stderr.readline():
        assert started.poll() is None
    os.killpg(started.pid, signal.SIGINT)  # as Ctrl-C does: to the children as well
    out, err = started.communicate(timeout=60)
    assert started.returncode == 130
    assert err.splitlines()[-1] == "longwave: interrupted: the contexts above were finished"
    assert "Traceback" not in err
    plain = json.loads(out.splitlines()[-1])
    assert plain == json.loads(saved.read_text())
    assert [one["context"] for one in plain["rows"]] == [64, 64]
    patience = time.monotonic() + 20
    while running := in_group(started.pid):
        assert time.monotonic() < patience, f"{running} are left"
        time.sleep(0.1)


def test_progress_that_nobody_reads_any_more_does_not_end_the_run(recipe: Path):
    """Nor is it mistaken for a model whose process has died."""
    size = ["--contexts", "64,2048", "--chunk", "64", "--text", str(recipe.parent / "text.txt"), "--against", "none"]
    command = [sys.executable, "-m", "longwave", "bench", "context", str(recipe), *size, "--json"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert started.stderr is not None
    while "up to 2,048" not in started.stderr.readline():
        assert started.poll() is None
    started.stderr.close()
    started.stderr = None
    output, _ = started.communicate(timeout=60)
    assert started.returncode == 0
    assert {row["context"] for row in json.loads(output.splitlines()[-1])["rows"]} == {64, 2048}
    patience = time.monotonic() + 20
    while running := in_group(started.pid):
        assert time.monotonic() < patience, f"{running} are left"
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--contexts", "128,64"], ["contexts = [128, 64]: ascending"]),
        (["--contexts", "64,64"], ["ascending"]),
        (["--contexts", "0,64"], ["'0'", "64k"]),
        (["--contexts", "many"], ["many"]),
        (["--chunk", "0"], ["chunk = 0: 1 or more"]),
        (["--chunk", "some"], ["--chunk", "some"]),
        (["--decode-steps", "0"], ["decode_steps = 0"]),
        (["--limit", "0"], ["limit = 0"]),
        (["--limit", "nan"], ["limit = nan"]),
        (["--memory", "much"], ["'much' is no number of bytes; write 512M or 8G"]),
        (["--repeats", "0"], ["repeats = 0"]),
        (["--dtype", "fp12"], ["fp12", "bf16"]),
        (["--device", "tpu"], ["device = 'tpu'", "cpu"]),
        (["--threads", "0"], ["threads = 0"]),
        (["--retention", "half"], ["half", "forced"]),
        (["--batch", "2"], ["--batch"]),
        (["--text", "nowhere.txt"], ["nowhere.txt: no such file"]),
        (["--against", "nowhere.toml"], ["nowhere.toml"]),
        (["--against", "OTHER"], ["vocab_size: the models have [300, 301]"]),
        (["--plot", "x.bmp"], ["x.bmp", ".svg or .png"]),
        (["--save", "FOLDER"], ["is a folder"]),
    ],
)
def test_mistakes_are_one_line(longwave, recipe: Path, arguments: list[str], says: list[str]):
    other = recipe.parent / "other.toml"
    other.write_text(recipe.read_text().replace("vocab_size = 300", "vocab_size = 301"))
    given = [str(other) if one == "OTHER" else one for one in arguments]
    text = [] if "--text" in given else ["--text", "TEXT"]
    code, out, err = longwave("context", "RECIPE", *text, *given)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("longwave: ")
    assert [word for word in says if word not in err] == []


def test_models_that_cannot_be_measured_are_one_line(longwave, recipe: Path):
    recipe.write_text(recipe.read_text().replace("F W subllm(0.64: F)", "2F").replace(WINDOW, ""))
    code, _, err = longwave("context", "RECIPE", "--text", "TEXT")
    assert code == 2
    assert "has full attention alone; give --against none" in err
    recipe.write_text(recipe.read_text().replace("vocab_size = 300", "vocab_size = 61"))
    code, _, err = longwave("context", "RECIPE", "--against", "none", "--text", "TEXT")
    assert (code, "vocab_size = 61" in err) == (2, True)
    assert longwave("context", "nowhere.toml")[0] == 2
