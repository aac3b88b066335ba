"""A part is a file and a line in a table: parts that longwave does not have get everything that its own get.

The laws, the formulas of costs, folders and the command line, without a line of the package changed (`extensions.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import runs
import torch
from contract import (
    AT_INFERENCE,
    CLOSE,
    Case,
    Check,
    alone,
    cases_of,
    causality,
    declared,
    decoder,
    distance,
    reordering,
    step,
)
from extensions import LETTERS, LEVELS, NEEDS, ListedAttention, registered
from hypothesis import given, settings
from hypothesis import strategies as st
from list_store import ListStore

import longwave as lw
from longwave.config import BlockConfig
from longwave.costs import total
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.laws import ALL
from longwave.model import Decoder
from longwave.ops.attention import ATTENTION
from longwave.streams import Stream, Windows

CASES = {
    **cases_of(LETTERS, LEVELS),
    "all of them": Case("A every_second(T blend(P L) A) blend(W T) 2F"),
    "a letter of a recipe": Case(
        "F Z", {"blocks": {"Z": BlockConfig(("average", "shift"), wiring="parallel")}, "average": NEEDS["average"]}
    ),
}
every_case = pytest.mark.parametrize("name", CASES)
FEW = settings(max_examples=5)


@pytest.fixture(autouse=True, scope="module")
def extended() -> Iterator[None]:
    with registered():
        yield


# --- laws -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [*(check for checks in AT_INFERENCE.values() for check in checks), reordering])
@every_case
@FEW
@given(data=st.data())
def test_laws_at_inference(name: str, check: Check, data: st.DataObject):
    model = decoder(CASES[name])
    assert declared(model, training=False) == ALL
    assert check(model, data.draw) <= CLOSE


@every_case
@FEW
@given(data=st.data())
def test_laws_in_training(name: str, data: st.DataObject):
    """Tokens before a change, and a document in and outside a window of several."""
    model = decoder(CASES[name]).train()
    assert causality(model, data.draw) <= CLOSE
    tokens, stream = torch.arange(30), Stream.of([9, 21], windows=Windows((30,), (4,)))
    assert distance(model(tokens, stream)[:9], alone(model, list(range(9)), sample=4)) <= CLOSE
    model.loss(tokens, tokens, stream).backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.parameters())


# --- weights, costs, stores and forms ---------------------------------------------------------------------------------


@every_case
def test_every_weight_is_drawn_once_and_by_its_seed(name: str):
    one, same, other = (Decoder(CASES[name].config(), seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_bracket_leaves_the_weights_of_its_body_alone():
    """Block 1 begins with the same weights in a bracket and without one."""
    bare, inside = (Decoder(Case(layout).config()) for layout in ("3F", "F blend(F) F"))
    for one, other in zip(bare.blocks, inside.blocks, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@every_case
def test_costs(name: str):
    model = decoder(CASES[name])
    for tokens in (0, 1, 24, 25):
        state = model.state()
        step(model, state, [list(range(tokens))])
        costs = total(model.costs(tokens))
        assert costs.parameters == sum(weight.numel() for weight in model.parameters())
        assert costs.state_bytes == state.used_bytes()
    assert model.prefill_flops(24) > model.prefill_flops(12) > 0


def test_a_part_is_kept_where_it_asks():
    state = decoder(CASES["all of them"]).state()
    kinds = {part: type(state._store_of[part]) for part in state.specs}
    listed = {part.site.name for part in decoder(CASES["all of them"]).parts if isinstance(part, ListedAttention)}
    assert {part for part, kind in kinds.items() if kind is ListStore} == listed
    assert listed


def test_a_form_runs_on_its_device_only():
    model = decoder(CASES["block T"])
    assert "T: attention here" in model.describe()[0]
    assert model.blocks[0].parts[0].reasons["attention"] == "ours, on cpu only"
    assert ATTENTION.forms_on(torch.device("cpu"))[0] == "here"
    assert ATTENTION.forms_on(torch.device("cuda"))[0] == "elsewhere"
    with pytest.raises(UserError, match="attention form = 'elsewhere': not on cpu; leave it out, or use torch"):
        model.use_form("elsewhere")
    tokens = list(range(20))
    ours = alone(model, tokens)
    model.use_form("reference", "attention")
    assert distance(ours, alone(model, tokens)) <= CLOSE


# --- folders and the command line -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model of all of them, with a tokenizer."""
    case = CASES["all of them"]
    model = Decoder(lw.ModelConfig(runs.VOCABULARY, 32, case.layout, **{**_tables(case), "context_window": 256}))
    model.tokenizer = Tokenizer.load(runs.prepared())
    path = tmp_path_factory.mktemp("extended") / "model"
    lw.save(model, path)
    return path


def _tables(case: Case) -> dict[str, object]:
    return dict(case.config().tables)


@every_case
def test_a_folder_gives_the_same_model_back(name: str, tmp_path: Path):
    model = decoder(CASES[name], seed=3)
    lw.save(model, tmp_path / "model")
    again = lw.load(tmp_path / "model").eval()
    assert again.config == model.config
    assert torch.equal(alone(again, range(20)), alone(model, range(20)))


def test_inspect_draws_a_page(longwave, folder: Path, tmp_path: Path):
    page = tmp_path / "page.html"
    result = longwave("inspect", folder, runs.corpus() / "bisect.py", "--first", "128", "--output", page)
    assert result.code == 0, result.err
    assert "<html" in page.read_text()


def test_plan_counts_it(longwave, folder: Path):
    result = longwave("plan", folder, "--context", "64", "--json")
    assert result.code == 0
    assert all(name in result.out for name in ("blend", "everysecond"))


def test_bench_times_it(longwave, folder: Path):
    sizes = ["--contexts", "48", "--batch", "1,2", "--repeats", "1", "--decode-steps", "2"]
    result = longwave("bench", "inference", folder, "--against", "none", *sizes)
    assert result.code == 0, result.err
