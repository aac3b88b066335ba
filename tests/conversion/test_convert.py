"""A conversion from its recipe to its folders: stages that go on to the bit, students side by side, what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from runs import CrashAt, StopAt, differing

import longwave as lw
from longwave import checkpoints
from longwave.config import ModelConfig, build
from longwave.conversion.convert import Conversion
from longwave.conversion.plan import plan_of_conversion
from longwave.conversion.recipe import ConversionRecipe, read_conversion
from longwave.conversion.record import Record, read_record
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.model import Decoder
from longwave.training.loop import Interrupted

TRAINING = {"window": 64, "batch_windows": 4, "log_every": 1, "checkpoint_every": 2, "evaluate_every": 2}
SPARSE = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "window_size": 8, "topk": 2}
STAGES: dict[str, Any] = {
    "align": {"kind": "align", "training": {"steps": 3}},
    "distil": {"kind": "distil", "training": {"steps": 5}},
    "long": {"kind": "train", "training": {"steps": 3}, "model": {"infllm": {"regime": "sparse"}}},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GQA Llama of four layers with the tokenizer of the data."""
    folder = tmp_path_factory.mktemp("source") / "llama"
    values = runs.values("llama")["model"] | {"layout": "4F"}
    model = Decoder(build(ModelConfig, values, "model"), seed=7)
    checkpoints.save(model, folder, tokenizer=Tokenizer.load(runs.prepared()), format="llama")
    return folder


def values(stages: Mapping[str, Any] = STAGES, **changes: Any) -> dict[str, Any]:
    return {
        "data": {"folder": str(runs.prepared())},
        "student": {"softmax": "S", "select": {"keep": 2}},
        "model": {"infllm": {**SPARSE, "regime": "dense"}},
        "training": {**TRAINING, "evaluate_windows": 4},
        "optimizer": runs.OPTIMIZERS["adamw"],
        "schedule": {"kind": "cosine", "warmup_steps": 1},
        "stages": dict(stages),
        **changes,
    }


def recipe(stages: Mapping[str, Any] = STAGES, **changes: Any) -> ConversionRecipe:
    return build(ConversionRecipe, values(stages, **changes), "tests")


def converted(source: Path, folder: Path, one: ConversionRecipe) -> Record:
    return Conversion(source, folder, one).run()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load(folder).state_dict()


@pytest.fixture(scope="module")
def straight(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "out"
    converted(source, folder, recipe())
    return folder


# The whole ----------------------------------------------------------------------------------------------------------


def test_a_conversion_ends_in_a_model_and_its_record(source: Path, straight: Path):
    model, found = lw.load(straight / "model"), read_record(straight)
    assert found is not None
    assert model.config.layout == "L S L S"
    assert model.config.table("infllm").regime == "sparse"
    assert isinstance(lw.generate(model, "def", max_new_tokens=3), str)
    assert [one.stage for one in found.stages] == ["align", "distil", "long"]
    assert all(one.finished for one in found.stages)
    assert found.students["student"].kept == [1, 3]
    assert found.stages[1].figures["held_out_kl"] < found.stages[1].start["held_out_kl"]
    assert len(found.stages[0].figures["r2"]) == 4
    assert found.stages[1].teacher["held_out_loss"] > 0


@pytest.mark.parametrize(
    ("stage", "observer"), [("align", CrashAt), ("distil", StopAt), ("distil", CrashAt), ("long", StopAt)]
)
def test_a_conversion_that_ends_in_a_stage_goes_on_to_the_same_bits(
    source: Path, straight: Path, tmp_path: Path, stage: str, observer: Any
):
    def breaks_off(name: str, run: Any) -> Any:
        return observer(2) if name == stage else StopAt(-1)

    with pytest.raises((Interrupted, ConnectionAbortedError)):
        Conversion(source, tmp_path / "out", recipe()).run(breaks_off)
    assert not (tmp_path / "out" / "model").exists()
    found = converted(source, tmp_path / "out", recipe())
    assert differing(weights(tmp_path / "out" / "model"), weights(straight / "model")) == []
    whole = read_record(straight)
    assert whole is not None
    for one, other in zip(found.stages, whole.stages, strict=True):
        assert (one.start, one.figures, one.tokens, one.flops) == (
            other.start,
            other.figures,
            other.tokens,
            other.flops,
        )


def test_a_finished_conversion_is_not_run_again(source: Path, straight: Path):
    before = (straight / "model" / "model.safetensors").stat().st_mtime_ns
    again = Conversion(source, straight, recipe()).run(lambda name, run: pytest.fail("a run"))
    assert again.stages == (read_record(straight) or again).stages
    assert (straight / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_stage_can_be_added_to_a_finished_conversion(source: Path, tmp_path: Path):
    first = {name: STAGES[name] for name in ("align", "distil")}
    converted(source, tmp_path / "out", recipe(first))
    before = weights(tmp_path / "out" / "model")
    found = converted(source, tmp_path / "out", recipe())
    assert [one.stage for one in found.stages] == ["align", "distil", "long"]
    assert differing(weights(tmp_path / "out" / "model"), before) != []


@pytest.mark.parametrize("student", [{"select": {"keep": 4}}, {"select": {"rule": "list", "layers": [0, 1, 2, 3]}}])
def test_zero_converted_layers_are_the_source_bit_for_bit(source: Path, tmp_path: Path, student: dict[str, Any]):
    """Acceptance check 35, through the whole pipeline."""
    converted(source, tmp_path / "out", recipe({}, student=student, model={}))
    theirs, ours = weights(source), weights(tmp_path / "out" / "model")
    assert differing(ours, theirs) == []


def test_gates_begin_open(source: Path, tmp_path: Path):
    """Gates that the source does not have, and what they gate, cancel at first; random ones do not."""
    model = {"infllm": {**SPARSE, "regime": "dense", "rotary": True}}
    student = {"softmax": "S", "select": {"keep": 4}}
    tokens, stream = torch.arange(20), lw.Stream.of((20,))
    expected = checkpoints.load(source)(tokens, stream)
    converted(source, tmp_path / "open", recipe({}, student=student, model=model))
    torch.testing.assert_close(checkpoints.load(tmp_path / "open" / "model")(tokens, stream), expected)
    converted(source, tmp_path / "random", recipe({}, student={**student, "gate": "random"}, model=model))
    assert not torch.allclose(checkpoints.load(tmp_path / "random" / "model")(tokens, stream), expected, atol=1e-4)


# Several students ---------------------------------------------------------------------------------------------------

STUDENTS = {
    "even": {},
    "last": {"select": {"rule": "last"}},
    "level": {"softmax": None, "layout": "F subllm(0.64: 2F) F"},
}


def test_students_side_by_side_end_as_each_does_alone(source: Path, tmp_path: Path, straight: Path):
    stages = {name: STAGES[name] for name in ("align", "distil")}
    model = {"infllm": {**SPARSE, "regime": "dense"}, "subllm": {"selection": "causal"}}
    several = recipe(stages, students=STUDENTS, model=model)
    converted(source, tmp_path / "all", several)
    for name in STUDENTS:
        own = {**values()["student"], **STUDENTS[name]}
        own["select"] = {"keep": 2, **own.get("select", {})}
        read = "subllm" if "layout" in own else "infllm"
        alone = recipe(stages, student={k: v for k, v in own.items() if v is not None}, model={read: model[read]})
        converted(source, tmp_path / name, alone)
        ours, theirs = weights(tmp_path / "all" / "models" / name), weights(tmp_path / name / "model")
        assert differing(ours, theirs) == [], name


def test_students_that_were_stopped_end_in_the_same_bits(source: Path, tmp_path: Path):
    stages = {name: STAGES[name] for name in ("align", "distil")}
    several = recipe(stages, students={"even": {}, "last": {"select": {"rule": "last"}}})
    converted(source, tmp_path / "straight", several)
    for step, name in ((2, "distil last"), (3, "distil even")):
        with pytest.raises(ConnectionAbortedError):
            Conversion(source, tmp_path / "out", several).run(
                lambda stage, run, step=step, name=name: CrashAt(step) if stage == name else StopAt(-1)
            )
    converted(source, tmp_path / "out", several)
    for name in ("even", "last"):
        ours, theirs = (weights(tmp_path / at / "models" / name) for at in ("out", "straight"))
        assert differing(ours, theirs) == []


def test_layers_can_be_replaced_in_stages(source: Path, tmp_path: Path):
    stages = {
        "align": STAGES["align"],
        "half": {"kind": "distil", "share": 0.5, "training": {"steps": 2}},
        "distil": STAGES["distil"],
    }
    found = converted(source, tmp_path / "out", recipe(stages))
    assert [one.layout for one in found.stages] == ["4L", "2S L S", "L S L S"]
    half = weights(tmp_path / "out" / "stages" / "half" / "model")
    assert "stack.layers.2.mixer.z_proj.weight" in half
    assert "stack.layers.0.mixer.o_gate.weight" in half


def test_levels_begin_where_they_break_little(source: Path, tmp_path: Path):
    """Those that are placed by some text lose less at first than those of a new model."""
    lost = dict[str, float]()
    for levels in ("placed", "new"):
        student = {"layout": "F subllm(0.9: 2F) F", "select": {"keep": 4}, "levels": levels}
        one = recipe({"train": {"kind": "train", "training": {"steps": 2}}}, student=student, model={})
        [stage] = converted(source, tmp_path / levels, one).stages
        lost[levels] = stage.start["held_out_loss"] - stage.teacher["held_out_loss"]
        assert len(stage.start["retention"]) == 1
    assert lost["placed"] < lost["new"]


def test_fine_tuning_leaves_queries_and_keys_of_softmax_layers(source: Path, tmp_path: Path):
    stages = {**STAGES, "sft": {"kind": "sft", "training": {"steps": 2}}}
    converted(source, tmp_path / "out", recipe(stages))
    before, after = (weights(tmp_path / "out" / "stages" / one / "model") for one in ("long", "sft"))
    changed = set(differing(before, after))
    frozen = {f"stack.layers.{layer}.mixer.{one}_proj.weight" for layer in (1, 3) for one in "qk"}
    assert changed == before.keys() - frozen - {name for name in before if "norm" in name and name not in changed}


def test_layers_are_selected_by_measurements_that_are_made_once(source: Path, tmp_path: Path):
    """The three rules over one set of figures; killed while it measures, it goes on and ends with the same."""
    students = {"kl": {"select": {"rule": "kl"}}, "sense": {"select": {"rule": "halo_corrected"}}}
    rest = {"students": students, "measure": {"recall": ["key-value"], "length": 60, "samples": 2, "windows": 2}}
    one, said = recipe({"align": STAGES["align"]}, **rest), list[str]()

    def stop(line: str) -> None:
        said.append(line)
        if "divergence" in line:
            raise ConnectionAbortedError

    with pytest.raises((ConnectionAbortedError, UserError)):
        Conversion(source, tmp_path / "out", one).run(say=stop)
    before = json.loads((tmp_path / "out" / "selection" / "measured.json").read_text())["figures"]
    again = list[str]()
    with pytest.raises(UserError, match="it tells none from another"):  # this teacher recalls nothing
        Conversion(source, tmp_path / "out", one).run(say=again.append)
    figures = json.loads((tmp_path / "out" / "selection" / "measured.json").read_text())["figures"]
    assert figures[: len(before)] == before
    assert sum(line.startswith("select: ") and "replaced" in line for line in again) == len(figures) - len(before)
    found = read_record(tmp_path / "out")
    assert found is not None
    assert len(found.students["kl"].kept) == 2
    assert found.selection["layers"]["rank by kl"]
    assert any("there is little that a conversion could lose" in line for line in again)


def test_heads_can_be_sorted(source: Path, tmp_path: Path):
    stages = {"align": STAGES["align"]}
    found = converted(
        source, tmp_path / "out", recipe(stages, student={"sort_heads": True, "select": {"keep": 1}}, model={})
    )
    assert found.stages[0].finished


def test_the_source_can_write_its_own_text(source: Path, tmp_path: Path):
    written = {"tokens": 3000, "length": 48, "held_out": 0.2}
    one = recipe({"distil": STAGES["distil"]}, written=written, data={})
    found = converted(source, tmp_path / "out", one)
    assert found.stages[0].figures["held_out_kl"] > 0
    rows = (tmp_path / "out" / "written" / "000000.jsonl").read_text().splitlines()
    assert len({json.loads(row)["text"] for row in rows}) > 1
    again = converted(source, tmp_path / "other", one)
    assert again.stages[0].figures == found.stages[0].figures


def test_logit_scaling_is_fitted_and_written(source: Path, tmp_path: Path):
    scaling = {"window": 128, "bases": [2, 500], "windows": 4}
    found = converted(source, tmp_path / "out", recipe({"distil": STAGES["distil"]}, logit_scaling=scaling))
    losses = found.students["student"].scaling
    assert losses.keys() == {"none", "2", "500"}
    best = min(losses, key=lambda name: losses[name])
    base = lw.load(tmp_path / "out" / "model").config.table("infllm").logit_scaling
    assert base == (None if best == "none" else float(best))


# The plan -----------------------------------------------------------------------------------------------------------


def test_the_published_schedule_takes_its_published_tokens(tmp_path: Path):
    """Acceptance check 43: 1,956.0 G tokens, 24.45 % of the source's 8 T."""
    config = {
        "architectures": ["MiniCPMForCausalLM"],
        "model_type": "minicpm",
        "vocab_size": 73448,
        "hidden_size": 4096,
        "intermediate_size": 16384,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "scale_emb": 12,
        "scale_depth": 1.4,
        "dim_model_base": 256,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = lw.plan_conversion(tmp_path, tmp_path / "out", "convert-sala", measure=False)
    assert round(plan.tokens / 1e9, 1) == 1956.0
    assert f"{plan.share:.2%}" == "24.45%"
    assert plan.students["student"].layout == "S 8L S 6L 2S 4L S 6L 3S"
    assert plan.students["student"].parameters == 9_477_203_968, "the published model's"
    assert not (tmp_path / "out").exists()


def test_planned_flops_are_those_that_are_spent(source: Path, straight: Path):
    plan, found = plan_of_conversion(Conversion(source, straight, recipe()), measure=False), read_record(straight)
    assert found is not None
    for planned, one in zip(plan.stages, found.stages, strict=True):
        assert planned.tokens == one.tokens
        assert 0.7 * planned.flops < one.flops <= planned.flops, "documents are shorter than windows"


def test_the_speed_is_measured_and_nothing_is_written(source: Path, tmp_path: Path):
    plan = plan_of_conversion(Conversion(source, tmp_path / "out", recipe({"distil": STAGES["distil"]})))
    assert plan.seconds is not None
    assert plan.seconds > 0
    assert not (tmp_path / "out").exists()


# What is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"student": {"select": {"keep": 5}}}, "softmax layers = 5: 0 to 4"),
        ({"student": {"select": {"rule": "list", "layers": [4]}}}, "select.layers = 4: the source has layers 0 to 3"),
        ({"student": {"select": {"pinned": [-5], "keep": 1}}}, "select.pinned = -5: the source has layers 0 to 3"),
        ({"student": {"select": {"pinned": [0, 1], "keep": 1}}}, "fewer than the 2 that are pinned"),
        ({"student": {"select": {"layers": [1]}}}, "select.layers: has no effect with rule = 'even'"),
        ({"student": {"layout": "3F"}}, "its blocks are not those of the source"),
        ({"student": {"linear": "Q"}}, "no block kind 'Q'"),
        ({"student": {"select": {"rule": "halo"}}, "stages": {"distil": STAGES["distil"]}}, "needs aligned layers"),
        ({"student": {"sort_heads": True}, "stages": {}}, "sort_heads = true: needs aligned layers"),
        ({"stages": {"distil": STAGES["distil"], "align": STAGES["align"]}}, "align comes before"),
        ({"stages": {"a": {"kind": "align"}, "b": {"kind": "align"}}}, "more than one of kind align"),
        ({"stages": {"x": {"kind": "fly"}}}, "use one of align, distil, train, sft"),
        ({"stages": {"x": {"kind": "train", "error": "mse"}}}, "unknown key"),
        ({"stages": {"../x": {"kind": "train"}}}, "a name of letters"),
        ({"stages": {"x": {"kind": "train", "tokens": 1e4, "training": {"steps": 3}}}}, "in place of training.steps"),
        ({"stages": {"x": {"kind": "train", "training": {"start_from": "x"}}}}, "training.start_from"),
        ({"stages": {"x": {"kind": "train", "share": 2}}}, "share = 2"),
        ({"stages": {"x": {"kind": "train", "students": ["nobody"]}}}, "students: student"),
        ({"data": {}, "stages": {"distil": STAGES["distil"]}}, "no data"),
        ({"data": {"folder": "nowhere"}}, "nowhere"),
        ({"model": {"window": {"size": 8}}, "student": {}}, "model.window has no effect"),
        ({"format": "gguf"}, "format = 'gguf'"),
        ({"students": {"a": {"linear": "W"}}}, "is the same for all students"),
        ({"format": "hypenet"}, "format = 'hypenet' cannot hold this model"),
        ({"students": {"student": {}}}, "students.student: is what one alone is called"),
        ({"written": {"tokens": 100}}, "leave out [data], or [written]"),
        ({"logit_scaling": {"window": 64}, "student": {}, "model": {}}, "is for students with S blocks"),
    ],
)
def test_what_cannot_be_converted_is_one_line_and_leaves_nothing(
    source: Path, tmp_path: Path, changes: dict[str, Any], says: str
):
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        converted(source, tmp_path / "out", recipe(**{"stages": STAGES, **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_source_with_other_layers_is_refused(tmp_path: Path):
    for layout, tables in (("2L", {}), ("F subllm(0.64: F)", {}), ("F L", {})):
        shape = runs.values("llama")["model"] | {"layout": layout, **tables}
        folder = tmp_path / layout.replace(" ", "").replace(":", "")
        checkpoints.save(Decoder(build(ModelConfig, shape, "model")), folder)
        with pytest.raises(UserError, match="softmax attention in every layer"):
            Conversion(folder, tmp_path / "out", recipe())


def test_a_folder_of_something_else_is_refused(source: Path, straight: Path, tmp_path: Path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists, and is no conversion"):
        Conversion(source, tmp_path / "full", recipe())
    with pytest.raises(UserError, match=r"a conversion with stages\.distil\.training\.steps = 5 there, 6 here"):
        Conversion(source, straight, recipe({**STAGES, "distil": {"kind": "distil", "training": {"steps": 6}}}))
    other = tmp_path / "other"
    checkpoints.save(Decoder(checkpoints.load_config(source), seed=1), other)
    with pytest.raises(UserError, match="a conversion of another source"):
        Conversion(other, straight, recipe())
    (straight.parent / "torn").mkdir()
    (straight.parent / "torn" / "conversion.json").write_text("{")
    with pytest.raises(UserError, match="not what a conversion writes"):
        Conversion(source, straight.parent / "torn", recipe())


def test_data_of_another_tokenizer_are_refused(source: Path, tmp_path: Path):
    lw.prepare(runs.corpus(), tmp_path / "data", vocab_size=290)
    with pytest.raises(UserError, match=r"stages\.align: .*tokenizer"):
        converted(source, tmp_path / "out", recipe(data={"folder": str(tmp_path / "data")}))
    assert not (tmp_path / "out").exists()


def test_free_settings_may_change(source: Path, straight: Path):
    again = Conversion(source, straight, recipe(training={**TRAINING, "evaluate_windows": 4, "log_every": 3}))
    assert [one.finished for one in again.record.stages] == [True, True, True]


@pytest.mark.parametrize("name", ["convert-hybrid", "convert-hypenet", "convert-sala"])
def test_recipes_of_the_package_are_recipes_of_conversions(name: str):
    assert read_conversion(name).stages


def test_the_command_converts_plans_and_goes_on(longwave: Any, refuses: Any, source: Path, tmp_path: Path):
    stages = {name: STAGES[name] for name in ("align", "distil")}
    file = tmp_path / "recipe.toml"
    file.write_text("\n".join(runs._toml(values(stages))) + "\n")
    given = ("convert", str(source), str(tmp_path / "out"), "--recipe", str(file))
    planned = longwave(*given, "--dry-run", "--json")
    assert "8 tensors copied" not in planned.out
    assert planned.json["students"]["student"]["layout"] == "L S L S"
    assert not (tmp_path / "out").exists()
    done = longwave(*given, "stages.distil.training.steps=2", "--json")
    assert done.json["stages"][1]["steps"] == 2
    assert (tmp_path / "out" / "report.html").is_file()
    assert "longwave convert" in (tmp_path / "out" / "report.html").read_text()
    refuses("convert", source, tmp_path / "out", says=["--recipe"])
