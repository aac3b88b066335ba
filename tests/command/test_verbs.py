"""The verbs as functions: the same options as on the command line, and typed results whose fields `--json` prints."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
import runs
from runs import write_recipe

import longwave as lw
from longwave import cli
from longwave.api import GenerateOptions
from longwave.cli.compare import VERB as COMPARE
from longwave.cli.convert import VERB as CONVERT
from longwave.cli.evaluate import VERB as EVALUATE
from longwave.cli.generate import VERB as GENERATE
from longwave.cli.options import Options
from longwave.cli.output import json_line
from longwave.cli.parser import Verb
from longwave.cli.plan import VERB as PLAN
from longwave.cli.prepare import VERB as PREPARE
from longwave.cli.train import VERB as TRAIN
from longwave.config import ModelConfig, build
from longwave.engine.sampling import Sampling
from longwave.errors import UserError
from longwave.inference.text import generate_text
from longwave.layers.mlp import MLPConfig
from longwave.mixers import AttentionConfig
from longwave.planning import Plan
from longwave.training.recipe import read_recipe

VERBS: dict[str, tuple[Verb, Callable[..., Any]]] = {
    "prepare": (PREPARE, lw.prepare),
    "train": (TRAIN, lw.train),
    "evaluate": (EVALUATE, lw.evaluate),
    "plan": (PLAN, lw.plan),
}
OF_FUNCTIONS = {"progress"}  # what a command line always does
OF_VERBS = {"json", "revision"}  # of a process; a part of the model's name, as in `org/name@v1`


@pytest.mark.parametrize("name", VERBS)
def test_a_function_has_the_options_of_its_verb(name: str):
    """Their names, defaults and types; what a verb takes by place, the function takes by place, in the same order."""
    verb, function = VERBS[name]
    options = {field.name: field for field in dataclasses.fields(verb.options) if field.name not in OF_VERBS}
    taken = {one.name: one for one in inspect.signature(function).parameters.values() if one.name not in OF_FUNCTIONS}
    assert taken.keys() == options.keys()
    assert [one.name for one in taken.values() if one.kind is one.POSITIONAL_OR_KEYWORD] == [
        field.name for field in dataclasses.fields(verb.options) if field.metadata["positional"]
    ]
    for parameter, field in ((taken[one], options[one]) for one in options):
        assert _same(parameter.default, field.default), field.name
    hints, declared = get_type_hints(function), get_type_hints(verb.options)
    for one in options:
        assert _kinds(declared[one]) <= _kinds(hints[one]), one


def _same(default: object, declared: object) -> bool:
    """Whether two defaults are one; on a command line a number of tokens is text."""
    if default is inspect.Parameter.empty or declared is dataclasses.MISSING:
        return default is inspect.Parameter.empty and declared is dataclasses.MISSING
    return default == declared or (type(declared) is str and str(default) == declared)


def _kinds(hint: Any) -> set[Any]:
    """The types that a value may have, choices one by one; any number of words is a sequence of them."""
    if get_origin(hint) in (Union, types.UnionType):
        return {kind for one in get_args(hint) for kind in _kinds(one)}
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    return {"words"} if get_origin(hint) is not None and str in get_args(hint) else {hint}


def test_a_function_that_has_drifted_is_found():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class More(Options):
        layers: int = dataclasses.field(default=3, metadata={"positional": False})

    VERBS["drifted"] = (Verb("drifted", "", More, vars), lambda layers=4: layers)
    try:
        with pytest.raises(AssertionError):
            test_a_function_has_the_options_of_its_verb("drifted")
    finally:
        del VERBS["drifted"]


def test_all_verbs_are_among_the_names_of_the_package():
    assert {*VERBS, "load", "save", "generate", "UserError"} <= {*dir(lw)} & {*lw.__all__}
    assert [name for name in dir(lw) if not hasattr(lw, name)] == []
    assert all(getattr(lw, name).__doc__ for name in VERBS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prepared") / "data"


def test_prepare_train_and_plan_give_what_their_verbs_print(longwave, data: Path, tmp_path: Path):
    prepared = lw.prepare(runs.corpus(), data, vocab_size=300, held_out=0.3, seed=1)
    assert prepared.documents == len(runs.FILES)
    options = ["--vocab-size", "300", "--held-out", "0.3", "--seed", "1", "--json"]
    printed = longwave("prepare", runs.corpus(), tmp_path / "again", *options).json
    assert printed == json.loads(json_line(prepared))

    recipe = write_recipe(tmp_path / "tiny.toml", "llama")
    changes = {"data.folder": str(data), "training.steps": 3, "schedule.warmup_steps": 1}
    words = [f"{key}={value}" for key, value in changes.items()]
    trained = lw.train(recipe, changes, output=tmp_path / "run")
    printed = longwave("train", recipe, *words, "--output", tmp_path / "run", "--json").json
    assert trained.model == tmp_path / "run/model"
    assert (trained.step, trained.held_out_loss) == (3, printed["held_out_loss"])
    assert printed.keys() == json.loads(json_line(trained)).keys()

    judged = lw.evaluate(trained.model, data)
    assert longwave("eval", trained.model, data, "--json").json == json.loads(json_line(judged))
    assert judged == lw.evaluate(lw.load(trained.model), data)
    assert judged.perplexity == pytest.approx(math.exp(judged.loss))

    planned = lw.plan(trained.model, context=[64, "1k"], dtype="fp32")
    assert longwave("plan", trained.model, "--context", "64,1k", "--dtype", "fp32", "--json").json == json.loads(
        json_line(planned)
    )
    assert planned.parameters == planned.total(64).parameters == sum(one.numel() for one in _weights(trained.model))
    assert planned.total(1024).state_bytes > planned.total(64).state_bytes
    assert all(dataclasses.is_dataclass(one) for one in (prepared, trained, judged, planned))


def _weights(folder: Path) -> list[Any]:
    return list(lw.load(folder).parameters())


def test_plan_of_a_config():
    config = ModelConfig(61, 32, "2F", attention=AttentionConfig(4), mlp=MLPConfig(40))
    planned = lw.plan(config)
    assert isinstance(planned, Plan)
    assert (planned.layout, planned.dtype, list(planned.contexts)) == ("2F", "bfloat16", [4096])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: lw.plan("quickstart-lama"), "did you mean quickstart-llama?"),
        (lambda: lw.plan("quickstart-llama", context=[]), "context: 0 numbers of tokens; give 1 to 100"),
        (lambda: lw.plan("quickstart-llama", context=0), "'0' is no number of tokens"),
        (lambda: lw.train("quickstart-llama", {"model.layers": 3}), "unknown key model.layers = 3"),
        (lambda: lw.train("quickstart-llama", "steps"), "'steps': an override reads key.path=value"),
        (lambda: lw.train("quickstart-llama", {"training.steps.x": 3}), "steps is a value, not a table"),
        (lambda: lw.train("quickstart-llama", {"model.attention.heads": 5}), "quickstart-llama: hidden_size = 192"),
        (lambda: lw.plan("nothing/here/at/all"), "neither a file nor the name of a recipe"),
        (lambda: lw.prepare("nowhere", "out"), "nowhere"),
    ],
)
def test_a_mistake_is_an_error_of_the_user(call: Callable[[], Any], says: str):
    with pytest.raises(UserError) as caught:
        call()
    assert says in str(caught.value)


def test_overrides_by_key_are_those_in_words():
    words = ["training.steps=30", "schedule.warmup_steps=3", "model.layout=2F subllm(0.5: 2F)", "optimizer.lr=1e-3"]
    values = {
        "training.steps": 30,
        "schedule.warmup_steps": 3,
        "model.layout": "2F subllm(0.5: 2F)",
        "optimizer.lr": 1e-3,
    }
    assert read_recipe("quickstart-llama", words) == read_recipe("quickstart-llama", values)


# --- recipes that nobody needs ----------------------------------------------------------------------------------------


HOSTILE = {
    "many digits": "[model]\nvocab_size = " + "1" * 5000,
    "arrays": "[model]\nx = " + "[" * 50_000,
    "inline tables": "[model]\nx = " + "{a = " * 5_000 + "1" + "}" * 5_000,
    "a dotted key": "[model]\n" + "a." * 50_000 + "a = 1",
    "a key with blanks": "[model]\n" + "a . " * 50_000 + "a = 1",
    "a quoted key": "[model]\n" + '"a".' * 50_000 + "a = 1",
    "a table's name": "[" + "a." * 50_000 + "a]\nx = 1",
    "tables": "".join(f"[{'.'.join('a' * n)}]\n" for n in range(1, 200)),
    "many keys": "[model]\n" + "".join(f"k{n} = 1\n" for n in range(50_000)),
    "a long key": "[model]\n" + "a" * 500_000 + " = 1",
    "a long value": "[model]\nlayout = '" + "F" * 500_000 + "'",
    "more than a recipe": "# " + "x" * (1 << 20),
    "a key twice": "[model]\n" + "a = 1\n" * 2,
    "nothing": "",
    "half a key": "[mod",
    "a wide model": "[model]\nvocab_size = 99999999999\nhidden_size = 8\nlayout = 'F'",
    "a negative size": "[model]\nvocab_size = -1\nhidden_size = 8\nlayout = 'F'",
    "not a number": "[model]\nvocab_size = nan\nhidden_size = inf\nlayout = 'F'",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("verb", ["plan", "train"])
def test_a_hostile_recipe_is_one_short_line(refuses, tmp_path: Path, name: str, verb: str):
    (tmp_path / "x.toml").write_text(HOSTILE[name])
    line = refuses(verb, tmp_path / "x.toml", says=["x.toml"])
    assert len(line) < 1200
    assert sorted(one.name for one in tmp_path.iterdir()) == ["x.toml"]


SIZES = {
    "8F": "vocab_size hidden_size context_window attention.heads attention.kv_heads attention.head_size mlp.size "
    "rotary.base norm_eps init.std",
    "2L": "lightning.heads lightning.kv_heads lightning.head_size",
    "2S": "infllm.kernel_size infllm.kernel_stride infllm.block_size infllm.topk infllm.init_blocks infllm.window_size "
    "infllm.dense_len",
    "2W": "window.size",
    "F subllm(0.5: 2F)": "subllm.balancer_steps subllm.threshold_memory subllm.retention_steps",
}


@pytest.mark.parametrize(("layout", "key"), [(layout, key) for layout, keys in SIZES.items() for key in keys.split()])
def test_a_size_beyond_all_machines_is_planned_or_refused(layout: str, key: str):
    """In a line, and at once: nothing of the size is made."""
    for value in (-1, 0, 1, 7, 1 << 26, 1 << 27, (1 << 27) + 1, 1 << 63, 10**30, math.inf, math.nan, "x", [], {}):
        began, line = time.perf_counter(), ""
        try:
            lw.plan(build(ModelConfig, _values(layout, key, value), "x.toml"), context=[1, 1 << 31])
        except UserError as error:
            line = str(error)
        assert len(line) < 400
        assert "\n" not in line
        assert time.perf_counter() - began < 5


def _values(layout: str, key: str, value: Any) -> dict[str, Any]:
    """Values of a small model of a layout, with one of them changed."""
    values: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "layout": layout, "mlp": {"size": 40}}
    values["window" if layout == "2W" else "mlp"] = {"size": 8}
    if layout not in ("2L",):
        values["attention"] = {"heads": 4}
    *tables, last = key.split(".")
    inner = values
    for table in tables:
        inner = inner.setdefault(table, {"heads": 4} if table == "lightning" else {})
    inner[last] = value
    return values


def test_every_verb_that_is_a_function_is_held_to_it():
    """All but `generate`, whose function takes a loaded model, and `compare` and `convert`, which can also plan."""
    verbs = {"evaluate" if verb.name == "eval" else verb.name for verb in cli.VERBS}
    functions = {name for name in lw.__all__ if inspect.isfunction(getattr(lw, name))}
    assert verbs & functions == {*VERBS, "compare", "convert", "generate"}


def test_compare_has_the_options_of_its_verb():
    options = {field.name for field in dataclasses.fields(COMPARE.options)} - OF_VERBS
    taken = inspect.signature(lw.compare).parameters.keys() - OF_FUNCTIONS
    assert taken - {"overrides"} == options - {"results", "dry_run"}


def test_convert_has_the_options_of_its_verb():
    options = {field.name for field in dataclasses.fields(CONVERT.options)} - OF_VERBS
    assert inspect.signature(lw.convert).parameters.keys() - OF_FUNCTIONS == options - {"dry_run"}


def test_generate_has_the_options_of_its_verb():
    options = {field.name: field for field in dataclasses.fields(GENERATE.options)}
    where = {"model", "prompt", "prompt_file", "device", "dtype", *OF_VERBS}  # of a process, or other arguments
    assert options.keys() - where == GenerateOptions.__annotations__.keys()
    texts = inspect.signature(generate_text).parameters
    defaults = {**dataclasses.asdict(Sampling()), **{name: one.default for name, one in texts.items()}}
    for name in GenerateOptions.__annotations__:
        assert defaults[name] == options[name].default, name
