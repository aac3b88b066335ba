"""The benchmarks: the yardstick computes what we do, tasks repeat, wrong outputs are refused, rows hold to formulas."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from longwave.benchmarks import models
from longwave.benchmarks.measure import roofline
from longwave.benchmarks.measure.checks import check_forms, check_logits, check_loss, one_pass
from longwave.benchmarks.measure.others import OtherWork, other_work
from longwave.benchmarks.measure.roofline import Level, Load, decode_work, measure_peaks
from longwave.benchmarks.measure.timing import Timing, interleaved
from longwave.benchmarks.models import (
    BenchOptions,
    Longwave,
    TimedModel,
    Transformers,
    bench_inference,
    bench_training,
    force_retention,
    retention_in,
    run,
    sample_tokens,
)
from longwave.benchmarks.results.results import Row
from longwave.benchmarks.results.table import tables
from longwave.config import ModelConfig, build
from longwave.costs import Peaks, Work, total
from longwave.errors import MachineError, UserError
from longwave.hf import transformers_from
from longwave.model import Decoder
from longwave.ops.attention import sdpa

SUBLLM = "F subllm(0.64: F subllm(0.64: F) F) F"
PEAKS = Peaks(bandwidth=1e12, flops=1e10)
OPTIONS = BenchOptions(contexts=(24,), batches=(1, 3), repeats=2, decode_steps=4, device="cpu")


def shape(layout: str, **values: Any) -> dict[str, Any]:
    """A small model's config as plain values."""
    attention, mlp = {"heads": 4, "kv_heads": 2}, {"size": 48}
    return {"vocab_size": 61, "hidden_size": 32, "layout": layout, "attention": attention, "mlp": mlp} | values


def decoder(layout: str = "3F", dtype: torch.dtype = torch.float32, **values: Any) -> Decoder:
    """The model with random weights, large enough that logits differ from token to token."""
    model = Decoder(build(ModelConfig, shape(layout, **values), "test"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1.0 if "norm" in name or "bypass" in name else 4.0)
    return model.to(dtype).eval()


def recipe(path: Path, layout: str) -> Path:
    """A recipe with nothing but a model."""
    text = f'[model]\nvocab_size = 61\nhidden_size = 32\nlayout = "{layout}"\ncontext_window = 64\n'
    path.write_text(text + "[model.attention]\nheads = 4\n[model.mlp]\nsize = 48\n")
    return path


def both(model: Decoder) -> list[TimedModel]:
    """Ours and the yardstick over the same weights."""
    return [Longwave("longwave", model), Transformers(model)]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_the_yardstick_shares_our_weights_and_gives_our_logits(tied: bool, bias: bool):
    attention = {"heads": 4, "kv_heads": 2, "head_size": 16, "qkv_bias": bias, "output_bias": bias}
    model = decoder(tie_embeddings=tied, attention=attention)
    llama = transformers_from(model)
    tokens = sample_tokens(model, 20, 0)
    torch.testing.assert_close(llama(tokens[None]).logits[0], one_pass(model, tokens, 20), rtol=1e-4, atol=1e-4)
    assert llama.model.embed_tokens.weight.data_ptr() == model.embed.weight.data_ptr()
    assert sum(weight.numel() for weight in llama.parameters()) == sum(weight.numel() for weight in model.parameters())


def test_the_yardstick_refuses_what_is_no_llama():
    with pytest.raises(UserError, match="layout"):
        Transformers(decoder(SUBLLM))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["3F", SUBLLM, "F 2L", "L subllm(0.64: L) W"])
def test_decoding_repeats_and_agrees_with_one_pass(layout: str, dtype: torch.dtype):
    model = decoder(layout, dtype, window={"size": 8} if "W" in layout else None)
    tokens = sample_tokens(model, 36, 1)
    context, following = tokens[:24], tokens[24:].view(3, 4)
    for timed in both(model) if layout == "3F" else [Longwave("longwave", model)]:
        for name, decoding in timed.after(context)(following).items():
            first, second = decoding.run(), decoding.run()
            torch.testing.assert_close(first, second, rtol=0, atol=0)
            for row in range(3):
                right = one_pass(model, torch.cat([context, following[row]]), 4)
                check_logits(name, first[row], right)
            assert 0 < decoding.used <= decoding.reserved


def test_a_sliding_window_is_decoded_beyond_what_it_holds():
    model = decoder("2W", window={"size": 8})
    tokens = sample_tokens(model, 36, 1)
    context, following = tokens[:24], tokens[24:].view(3, 4)
    theirs = Transformers(model).after(context)(following)
    assert list(theirs) == ["transformers, dynamic cache"]
    (decoding,) = theirs.values()
    for found in (decoding.run(), decoding.run()):
        for row in range(3):
            check_logits("theirs", found[row], one_pass(model, torch.cat([context, following[row]]), 4))
    assert decoding.used == decoding.reserved == 2 * 2 * 3 * 2 * 7 * 8 * 4  # of 8 tokens the next one is still to come


def test_a_state_is_as_large_as_the_formulas_say():
    model = decoder("3F")
    tokens = sample_tokens(model, 36, 1)
    for timed in both(model):
        for decoding in timed.after(tokens[:24])(tokens[24:].view(3, 4)).values():
            assert decoding.used == 3 * total(model.costs(24)).state_bytes


def test_losses_agree_and_training_tasks_learn():
    for precision in ("fp32", "bf16"):
        model = decoder("3F")
        tokens = sample_tokens(model, 40, 0).view(2, 20)
        for timed in both(model):
            before = timed.loss(tokens, precision)
            check_loss(timed.name, before, Longwave("ours", model).loss(tokens, precision), precision)
            task = timed.trainer(tokens, precision)
            for _ in range(3):
                task()
            assert timed.loss(tokens, precision) < before


@pytest.mark.parametrize("layout", [SUBLLM, "2F subllm(0.3: F) F"])
def test_forced_retention_is_nominal_and_decoding_meets_it(layout: str):
    model = decoder(layout)
    tokens = sample_tokens(model, 2000, 3)
    forced = force_retention(model, tokens)
    assert [float(one.retention) for one in model.resamplers] == pytest.approx(forced, abs=0.01)
    _, again = retention_in(model, Longwave("ours", model).prefill(tokens))
    assert again == pytest.approx(forced, abs=0.001)
    steps = 200
    load = Longwave("ours", model).after(tokens[:-steps])(tokens[None, -steps:])["ours"].load
    through = torch.tensor(forced).cumprod(0).tolist()
    assert load.retention == pytest.approx(through, abs=0.1)
    assert [load.levels[one.index].held / 1900 for one in model.resamplers] == pytest.approx(through, abs=0.03)


def test_a_wrong_model_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    model = decoder("3F")
    wrong = decoder("3F")
    with torch.no_grad():
        wrong.blocks[1].mlp.down_proj.weight.mul_(3)
    yardstick = Transformers(wrong)
    yardstick.decoder = model
    compared: list[TimedModel] = [Longwave("longwave", model), yardstick]
    monkeypatch.setattr(models, "interleaved", lambda *_, **__: pytest.fail("it was timed"))
    with pytest.raises(MachineError, match=r"transformers, prefill: its logits are off by .* of the largest"):
        bench_inference(compared, PEAKS, OPTIONS)
    with pytest.raises(MachineError, match="transformers: its loss is"):
        bench_training(compared, PEAKS, OPTIONS)


def test_wrong_decoding_is_not_timed(monkeypatch: pytest.MonkeyPatch):
    model = decoder(SUBLLM)
    right = one_pass(model, sample_tokens(model, 28, 0), 5)
    monkeypatch.setattr(models, "one_pass", lambda *_: torch.cat([right[:1], right[1:].flip(0)]))
    with pytest.raises(MachineError, match="longwave, decoding: its logits"):
        bench_inference([Longwave("longwave", model)], PEAKS, OPTIONS)


def test_checks_see_what_is_wrong():
    right = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    check_logits("same", right + 1e-6, right)
    check_logits("rounded", right.bfloat16(), right)
    with pytest.raises(MachineError, match="off by"):
        check_logits("off", right + 0.1, right)
    with pytest.raises(MachineError, match="cosine"):
        check_logits("off", (right + 0.2).bfloat16(), right)
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.raises(MachineError, match="not finite"):
            check_logits("broken", right.to(dtype).index_fill(1, torch.tensor([3]), torch.nan), right)
    with pytest.raises(MachineError, match="its loss is nan"):
        check_loss("broken", float("nan"), float("nan"), "fp32")


@pytest.mark.parametrize("layout", ["3F", SUBLLM])
def test_a_model_is_held_to_attention_in_its_plain_form(layout: str, monkeypatch: pytest.MonkeyPatch):
    model = decoder(layout, hidden_size=128)  # heads of 32, for which a CPU may have a form that is preferred
    tokens = sample_tokens(model, 40, 0)
    model.use_form("torch")
    check_forms(model, tokens)
    assert {block.mixer.forms["attention"] for block in model.blocks} == {"torch"}
    packed = sdpa._packed
    monkeypatch.setattr(sdpa, "_packed", lambda query, *rest: packed(query * 1.2, *rest))
    with pytest.raises(MachineError, match="the forms attention torch, gated torch: its logits are off"):
        check_forms(model, tokens)
    assert {block.mixer.forms["attention"] for block in model.blocks} == {"torch"}


def test_rows_of_inference_hold_to_the_formulas():
    model, llama = decoder(SUBLLM), decoder("5F")
    compared: list[TimedModel] = [Longwave("subllm", model), Longwave("llama", llama)]
    rows = bench_inference(compared, PEAKS, replace(OPTIONS, retention="forced"))
    places = [(row.quantity, row.batch, row.subject) for row in rows]
    assert places == [(q, b, s) for q, b in (("prefill", 1), ("decode", 1), ("decode", 3)) for s in ("subllm", "llama")]
    ours, reference = rows[0], rows[1]
    assert reference.work.flops == llama.prefill_flops(24)
    assert reference.bound == pytest.approx(reference.work.flops / PEAKS.flops)
    assert ours.retention == pytest.approx((0.64, 0.64), abs=0.1)
    assert ours.bound_ratio == pytest.approx(ours.work.flops / reference.work.flops)
    for row in rows:
        assert row.mfu == pytest.approx(row.work.flops / row.timing.median / PEAKS.flops)
        assert row.ratio is not None
        assert row.gain_of_bound == pytest.approx(row.bound / rows[rows.index(row) | 1].bound / row.ratio)
    assert rows[3].work.flops == pytest.approx(llama.decode_flops(24 + 2), rel=1e-6)
    assert rows[5].work.flops == pytest.approx(3 * rows[3].work.flops)
    assert rows[2].state_used < rows[3].state_used


def test_rows_of_training_hold_to_the_formulas():
    model = decoder("3F")
    rows = bench_training(both(model), PEAKS, OPTIONS)
    assert [(row.batch, row.subject) for row in rows] == [
        (batch, name) for batch in (1, 3) for name in ("longwave", "transformers")
    ]
    for row in rows:
        assert row.work.flops == row.batch * model.training_flops(24)
        assert row.tokens == row.batch * 24
        assert row.bound_ratio == 1


def test_decoding_work_of_a_llama_is_that_of_its_costs():
    model = decoder("3F")
    work = sum(decode_work(model, Load({-1: Level(24, 1, 1)})), Work(0, 0))
    costs = total(cost for cost in model.costs(24) if cost.kind != "embedding")
    assert (work.flops, work.bytes) == (costs.decode_flops, costs.decode_bytes)
    more = sum(decode_work(model, Load({-1: Level(24, 8, 1)})), Work(0, 0))
    assert more.flops == 8 * work.flops
    assert more.bytes - work.bytes == 7 * costs.state_bytes  # weights are read once for all


def test_the_bound_is_of_bytes_or_flops():
    assert Work(flops=2e10, bytes=1e12).seconds(PEAKS) == 2.0
    assert Work(flops=1e10, bytes=3e12).seconds(PEAKS) == 3.0


def test_peaks_are_measured(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(roofline._SIZES, "cpu", (1 << 22, 128))
    assert all(value > 1e6 for value in vars(measure_peaks(torch.float32)).values())


def test_the_reference_of_decoding_is_the_faster_cache(monkeypatch: pytest.MonkeyPatch):
    seconds = {"longwave": 1.0, "transformers": 2.0}
    seconds |= {"transformers, dynamic cache": 4.0, "transformers, static cache": 2.0}
    monkeypatch.setattr(models, "interleaved", lambda forms, *_, **__: {key: Timing((seconds[key],)) for key in forms})
    rows = bench_inference(both(decoder("3F")), PEAKS, replace(OPTIONS, batches=(1,)))
    assert [row.ratio for row in rows if row.quantity == "decode"] == [0.5, 2.0, 1.0]


def test_ratios_are_medians_over_rounds():
    assert Timing((1.0, 4.0, 9.0)).ratio(Timing((1.0, 2.0, 3.0))) == 2.0
    order: list[str] = []
    timings = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert order == ["a", "b"] * 3
    assert len(timings["a"].seconds) == 2


def test_recipes_are_compared_and_results_are_plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "measure_peaks", lambda *_: PEAKS)
    ours, other = recipe(tmp_path / "subllm.toml", SUBLLM), recipe(tmp_path / "llama.toml", "5F")
    options = replace(OPTIONS, batches=(1,), retention="forced", repeats=1)
    results, _ = run("inference", ours, other, options)
    assert {name: model.layout for name, model in results.models.items()} == {"subllm": SUBLLM, "llama": "5F"}
    plain = json.loads(json.dumps(results.plain()))
    assert [row["subject"] for row in plain["rows"]] == ["subllm", "llama"] * 2
    assert plain["rows"][0]["retention"] == pytest.approx([0.64, 0.64], abs=0.1)
    assert {"device", "threads", "torch", "transformers", "dtype"} <= plain["hardware"].keys()
    assert len(tables(results)) == 4  # what it ran on, prefill, decode, the bars
    alone, _ = run("training", ours, None, options)
    assert [row.ratio for row in alone.rows] == [None]


def test_recipes_for_the_record_are_of_the_stated_size():
    from longwave.planning import meta_model, model_config
    from longwave.recipes import recipe_path

    for name in ("bench-llama", "bench-llama-24", "bench-subllm-24"):
        costs = total(meta_model(model_config(recipe_path(name))).costs(1))
        assert 90e6 < costs.parameters < 110e6


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "measure_peaks", lambda *_: PEAKS)
    ours = recipe(tmp_path / "llama.toml", "2F")
    with pytest.raises(UserError, match="context_window is 64"):
        run("inference", ours, None, replace(OPTIONS, contexts=(61,)))
    with pytest.raises(UserError, match="repeats = 0"):
        replace(OPTIONS, repeats=0)
    with pytest.raises(UserError, match=r"batches = \[\]"):
        replace(OPTIONS, batches=())
    other = tmp_path / "other.toml"
    other.write_text(ours.read_text().replace("vocab_size = 61", "vocab_size = 62"))
    with pytest.raises(UserError, match="vocab_size: the models have"):
        run("inference", ours, other, OPTIONS)


def test_rows_without_a_reference_have_no_ratio():
    row = Row("prefill", 1, 1, "one", Timing((2.0,)), 1, Work(1e10, 0), 1.0, PEAKS)
    assert (row.of_bound, row.mfu, row.gain_of_bound) == (0.5, 0.5, None)


# --- other work -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "threads", "busy", "disturbs"),
    [
        (2, 2, 0.1, False),
        (2, 2, 0.5, True),
        (2, 1, 0.9, False),
        (2, 1, 1.5, True),
        (64, 2, 40.0, False),
        (64, 64, 40.0, True),
        (2, 8, 0.1, False),
        (2, 2, None, False),
    ],
)
def test_other_work_disturbs_where_it_leaves_too_few_cores(
    cores: int, threads: int, busy: float | None, disturbs: bool
):
    assert OtherWork(cores, threads, busy).disturbs is disturbs


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system does not tell what other processes do")
def test_the_work_of_another_process_is_seen_and_ones_own_is_not():
    """A process that spins counts as up to a core; what this one does is not counted: no machine has so much work."""
    spin = "print(flush=True)\nwhile True: pass"
    other = subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        began, own = time.monotonic(), time.process_time()
        with other_work() as found:
            _spin(1.0)
        share = (time.process_time() - own) / (time.monotonic() - began)
    finally:
        other.kill()
        other.wait()
    assert found.busy is not None
    assert found.busy > 0.3  # less than a core where more processes than these two run
    assert found.busy < found.cores - share + 0.2
    assert f"other processes kept {found.busy:.1f} of {found.cores} cores busy" in found.words()


def test_a_system_that_does_not_tell_is_named(monkeypatch):
    monkeypatch.setattr("longwave.benchmarks.measure.others._busy_seconds", lambda cores: None)
    with other_work() as found:
        pass
    assert (found.busy, found.disturbs) == (None, False)
    assert "does not tell" in found.words()


def _spin(seconds: float) -> None:
    """Keeps this process busy."""
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


@pytest.mark.parametrize(
    ("layout", "against"), [("2F", "transformers"), ("F subllm(0.64: F) F", "dense"), ("S L", "dense")]
)
def test_what_a_model_is_timed_against_by_default(layout: str, against: str, longwave, tmp_path):
    """Transformers where it has such a model, else the dense twin; at contexts that fit into the window."""
    shape = f"vocab_size = 300\nhidden_size = 32\nlayout = '{layout}'\ncontext_window = 128\n"
    subllm = "[model.subllm]\nselection = 'causal'\n" if "subllm" in layout else ""
    parts = "[model.attention]\nheads = 2\n[model.mlp]\nsize = 48\n"
    (tmp_path / "one.toml").write_text(f"[model]\n{shape}{parts}{subllm}")
    for kind in ("inference", "training"):
        result = longwave("bench", kind, tmp_path / "one.toml", "--repeats", 1, "--json")
        assert result.code == 0, result.err
        rows = result.json["rows"]
        assert {row["context"] for row in rows} == {96 if kind == "inference" else 128}
        assert any(row["subject"].startswith(against) for row in rows)
