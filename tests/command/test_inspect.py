"""`longwave inspect`: figures against plain recomputation, the page in a browser, every odd text through the verb."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from contract import CASES, decoder
from hypothesis import given
from hypothesis import strategies as st
from op_inputs import of_stream
from reports import HOSTILE, Page, drawn_file, is_ready

import longwave as lw
from longwave.blocks import BLOCKS
from longwave.cli import main
from longwave.config import build
from longwave.costs import At
from longwave.data.tokenizer import Tokenizer
from longwave.errors import UserError
from longwave.inspection import attention as attention_module
from longwave.inspection.agreement import Statistic, agreement
from longwave.inspection.attention import BlockAttention, watching_attention
from longwave.inspection.flops import TokenFlops, extremes, token_flops
from longwave.inspection.inspect import block_before
from longwave.inspection.source import pieces
from longwave.inspection.trace import LevelTrace, by_token, trace_levels, watching_levels
from longwave.model import Decoder
from longwave.ops.attention import Pattern, attention
from longwave.ops.attention.weights import attention_weights
from longwave.streams import Stream

NESTED = "F subllm(0.64: F subllm(0.64: F) F) F"
SIBLINGS = "F subllm(0.64: F subllm(0.5: F)) subllm(0.7: W) F"


def model_of(layout: str, dtype: torch.dtype = torch.float32, **values: Any) -> Decoder:
    """A tiny random model; half of the tokens of each level score above its threshold."""
    shape = {"vocab_size": runs.VOCABULARY, "hidden_size": 32, "attention": {"heads": 4, "kv_heads": 2}}
    rest = {**shape, "mlp": {"size": 48}, "window": {"size": 5} if "W" in layout else None}
    config = build(lw.ModelConfig, {"layout": layout, "context_window": 512, **rest, **values}, "test")
    return Decoder(config).to(dtype).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(runs.prepared())


@pytest.fixture(scope="module")
def folders(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Saved models by name; nobody changes them."""
    home = tmp_path_factory.mktemp("models")
    for name, layout in {"nested": NESTED, "siblings": SIBLINGS, "llama": "6F", "short": "2F"}.items():
        model = model_of(layout)
        model.tokenizer = tokenizer
        lw.save(model, home / name)
    return {path.name: path for path in home.iterdir()}


@pytest.fixture(scope="module")
def text() -> Path:
    return runs.corpus() / "textwrap.py"


def ids_of(count: int, seed: int = 0) -> list[int]:
    return torch.randint(2, runs.VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# --- the weights of attention -----------------------------------------------------------------------------------------


@given(
    st.integers(1, 40), st.sampled_from([1, 2, 4]), st.sampled_from([None, 1, 3, 64]), st.sampled_from([1, 100, 4000])
)
def test_weights_times_values_are_attention(tokens: int, groups: int, window: int | None, most: int):
    draw = torch.Generator().manual_seed(tokens)
    query = torch.randn(tokens, 4, 8, dtype=torch.float64, generator=draw)
    key, value = torch.randn(2, tokens, groups, 8, dtype=torch.float64, generator=draw)
    laid, pattern = of_stream(key, value, (tokens,)), Pattern(window)
    expected = attention(query, *laid, pattern=pattern, scale=0.3, form="reference").output
    values = value.repeat_interleave(4 // groups, dim=1)
    rows = []
    for start, first, weights in attention_weights(query, key, window=window, scale=0.3, most=most):
        assert start == sum(len(row) for row in rows)
        assert weights.shape[1] == 1 or weights.numel() <= most
        rows.append(torch.einsum("hcn,nhk->chk", weights, values[first : first + weights.shape[2]]))
    assert torch.allclose(torch.cat(rows), expected, atol=1e-12)


def plain_weights(model: Decoder, ids: list[int], depth: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Places and the whole (H, N, N) weights of one block, by the mixer's own queries and keys and the formula."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def note(mixer: Any, inputs: Any) -> None:
        query, key = mixer.queries_and_keys(*inputs[:2])
        key = key.repeat_interleave(mixer.heads // mixer.kv_heads, dim=1)
        logits = torch.einsum("qhk,nhk->hqn", query, key) * mixer.head_size**-0.5
        rows, columns = torch.arange(len(query)).unsqueeze(1), torch.arange(len(query))
        outside = (columns > rows) | (columns <= rows - (mixer.pattern.window or len(query)))
        seen.append((inputs[1].order, logits.masked_fill(outside, -torch.inf).softmax(-1)))

    hook = model.blocks[depth].mixer.register_forward_pre_hook(note)
    model.hidden(torch.tensor(ids), Stream.of([len(ids)]))
    hook.remove()
    return seen[0]


@torch.no_grad()
def watched(model: Decoder, ids: list[int], heads: tuple[int | None, ...] = ()) -> dict[int, BlockAttention]:
    with watching_attention(model, range(len(model.blocks)), heads) as found:
        model.hidden(torch.tensor(ids), Stream.of([len(ids)]))
    return found


@torch.no_grad()
@pytest.mark.parametrize("layout", [NESTED, SIBLINGS])
def test_attention_received_is_relative_to_the_distances_it_is_seen_from(layout: str):
    model, ids = model_of(layout, torch.float64), ids_of(90)
    found = watched(model, ids, (None, 2))
    assert list(found) == list(range(len(model.blocks)))
    for depth, block in found.items():
        places, weights = plain_weights(model, ids, depth)
        assert block.places.tolist() == places.tolist()
        mean, tokens, window = weights.mean(0), len(places), model.blocks[depth].mixer.state_spec().window
        typical = [
            float(mean.diagonal(-d)[1:].mean()) if d < tokens - 1 else 0.0 for d in range(tokens)
        ]  # without the first key
        expected = [float(mean[:, u].sum()) / sum(typical[: tokens - u]) for u in range(tokens)]
        assert torch.allclose(block.received, torch.tensor(expected, dtype=torch.float64))
        assert block.viewers.tolist() == [min(tokens - u, window or tokens) for u in range(tokens)]
        assert block.first_share == pytest.approx(float(mean[:, 0].sum() / tokens))
        assert [one.head for one in block.maps] == [None, 2]
        assert torch.allclose(block.maps[0].cells, mean)
        assert torch.allclose(block.maps[1].cells, weights[2])


@torch.no_grad()
def test_maps_pool_what_is_too_large_and_lose_nothing(monkeypatch: pytest.MonkeyPatch):
    model, ids = model_of("2F", torch.float64), ids_of(70)
    _, weights = plain_weights(model, ids, 1)
    monkeypatch.setattr(attention_module, "CELLS", 16)
    block = watched(model, ids, (3,))[1]
    edges, cells = block.edges, block.maps[0].cells
    assert (edges[0], edges[-1], len(edges)) == (0, 70, 17)
    for row in range(16):
        for column in range(16):
            piece = weights[3][edges[row] : edges[row + 1], edges[column] : edges[column + 1]]
            assert float(cells[row, column]) == pytest.approx(float(piece.sum() / piece.shape[0]))
    assert torch.allclose(cells.sum(1), torch.ones(16, dtype=torch.float64))


def test_watching_leaves_no_hook_and_changes_no_result():
    model, ids = model_of(NESTED), torch.tensor(ids_of(50))
    before = model(ids, Stream.of([50]))
    with watching_levels(model), watching_attention(model, {0, 1}):
        assert torch.equal(model(ids, Stream.of([50])), before)
    with pytest.raises(UserError), watching_levels(model), watching_attention(model, {0, 1}):
        model(torch.tensor([runs.VOCABULARY]), Stream.of([1]))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# --- levels -----------------------------------------------------------------------------------------------------------


def test_every_level_is_traced_nested_or_side_by_side():
    model, ids = model_of(SIBLINGS), ids_of(200)
    outer, inner, sibling = levels = trace_levels(model, ids)
    assert outer.places.tolist() == sibling.places.tolist() == list(range(200))
    assert inner.places.tolist() == outer.places[outer.kept].tolist()
    for level in levels:
        assert level.kept.tolist() == (level.scores > 0).tolist()
        assert 0 < level.kept.sum() < len(level.kept)
    tokens = by_token(levels, 200)
    for place, token in enumerate(tokens):
        assert (0 in token.kept, 2 in token.kept) == (bool(outer.kept[place]), bool(sibling.kept[place]))
        assert (token.scores[1] is None) == (0 not in token.kept)
        assert token.scores[0] == float(outer.scores[place])
    assert sum(1 in token.kept for token in tokens) == int(inner.kept.sum())


def test_a_level_that_nothing_reaches_is_empty():
    model = model_of(NESTED)
    model.resamplers[0].threshold.low.fill_(1e9)
    outer, inner = trace_levels(model, ids_of(20))
    assert (len(outer.places), int(outer.kept.sum()), len(inner.places)) == (20, 0, 0)
    assert by_token([outer, inner], 20)[7].kept == ()


@pytest.mark.parametrize(
    ("layout", "before"),
    [
        (NESTED, [0, 1]),
        (SIBLINGS, [0, 1, 0]),  # what stands just before the last level runs inside another
        ("subllm(0.5: F) F", [None]),
        ("F W subllm(0.5: subllm(0.5: F) F)", [1, 1]),
    ],
)
def test_the_block_before_a_level_sees_every_token_that_enters_it(layout: str, before: list[int | None]):
    model = model_of(layout)
    found = [block_before(model, level) for level in model.resamplers]
    assert [block and block.site.depth for block in found] == before


# --- agreement --------------------------------------------------------------------------------------------------------


def paired(scores: torch.Tensor, received: torch.Tensor, kept: torch.Tensor) -> Any:
    places, tokens = torch.arange(len(scores)), len(scores)
    block = BlockAttention(0, -1, None, places, received.double(), tokens - places, 0.1, (0, tokens), ())
    return agreement(LevelTrace(0, places, scores, kept), block)


def draws(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def inside(figure: Statistic) -> bool:
    return figure.low <= figure.value <= figure.high


def test_keeping_the_most_attended_agrees_wholly():
    scores = draws(800, 0)
    found = paired(scores, scores + 10, scores > 0)
    for name in ("overlap", "overlap_nearby", "correlation", "correlation_nearby"):
        assert getattr(found, name).value == pytest.approx(1), name
        assert not inside(getattr(found, name))
    assert found.compared == 800 - 1 - 31  # without the first, and those that fewer than 32 can see
    assert found.overlap.chance == pytest.approx(float((scores > 0).double()[1:-31].mean()), abs=0.01)


def test_unrelated_scores_lie_within_chance():
    found = [paired(draws(800, seed), draws(800, seed + 99) ** 2, draws(800, seed) > 0.3) for seed in range(12)]
    for name in ("overlap", "overlap_nearby", "correlation", "correlation_nearby", "distance"):
        assert sum(inside(getattr(one, name)) for one in found) >= 9, name


def test_neighbours_do_not_count_a_trend_along_the_text():
    trend = torch.linspace(4, 0, 800)
    scores = trend + draws(800, 1)
    found = paired(scores, trend + draws(800, 2).abs(), scores > 2)
    assert found.correlation.value > 0.6
    assert abs(found.correlation_nearby.value) < 0.1
    assert found.distance.value < found.distance.low
    assert sum(found.distribution.kept) == pytest.approx(1)
    assert (found.distribution.edges[0], found.distribution.edges[-1]) == (1, 769)  # those that are compared
    assert found.distribution.kept[0] > 2 * found.distribution.kept[-1]


def test_correlation_is_spearmans_with_shared_ranks():
    scores, received = torch.tensor([1.0, 2, 2, 3] * 8), torch.tensor([2.0, 1, 3, 3] * 8)
    found = paired(scores, received, scores > 1)  # the first is left out, as are the last three
    kept = slice(1, 29)
    ranks = [
        torch.stack([(one < x).sum() + ((one == x).sum() - 1) / 2 for x in one])
        for one in (scores[kept], received[kept])
    ]
    expected = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    assert found.correlation.value == pytest.approx(expected)


def test_only_tokens_that_both_met_are_compared():
    scores, places = draws(100, 3), torch.arange(100) * 2
    level = LevelTrace(0, places, scores, scores > 0)
    block = BlockAttention(
        4, -1, None, torch.arange(200), draws(200, 4).double(), 200 - torch.arange(200), 0.0, (0, 200), ()
    )
    block.received[places] = scores.double()
    found = agreement(level, block)
    assert (found.compared, found.depth) == (87, 4)  # even places from 2 to 174
    assert found.correlation.value == pytest.approx(1)


@pytest.mark.parametrize(
    ("count", "low", "reason"),
    [(10, 0, "only 9 tokens can be compared"), (100, -99, "every token"), (100, 99, "no token")],
)
def test_what_cannot_be_compared_says_why(count: int, low: float, reason: str):
    scores = draws(count, 5)
    found = paired(scores, scores, scores > low)
    assert found.overlap is None
    assert reason in found.reason


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [NESTED, SIBLINGS, "3F 2W"])
def test_flops_of_the_tokens_add_up_to_those_of_the_parts(layout: str):
    model, tokens = model_of(layout), 120
    levels = trace_levels(model, ids_of(tokens))
    costs = token_flops(model, levels, tokens)
    counts = {-1: tokens, **{level.index: int(level.kept.sum()) for level in levels}}
    parts = {
        n: {block.site.depth: block.costs(At(n, torch.float32))[0].prefill_flops for block in model.blocks}
        for n in {*counts.values()}
    }
    assert float(costs.spent.sum()) == sum(parts[counts[block.site.level]][block.site.depth] for block in model.blocks)
    assert float(costs.dense.sum()) == sum(parts[tokens].values())
    assert (costs.spent <= costs.dense).all()
    assert costs.head == model.head_flops()


@pytest.mark.parametrize("letter", BLOCKS)
def test_writing_token_by_token_costs_what_reading_at_once_does(letter: str):
    for part in decoder(CASES[f"block {letter}"]).blocks[0].parts:
        assert sum(part.decode_flops(context) for context in range(50)) == part.prefill_flops(50)


def test_a_dropped_token_pays_for_the_outer_blocks_alone():
    model = model_of(NESTED)
    (outer, inner), costs = (levels := trace_levels(model, ids_of(60))), token_flops(model, levels, 60)
    place = int(outer.places[~outer.kept][-1])
    assert float(costs.spent[place]) == sum(model.blocks[depth].decode_flops(place) for depth in (0, 4))
    place = int(inner.places[inner.kept][-1])
    before = [int((one.kept & (one.places < place)).sum()) for one in (outer, inner)]
    paid = [(0, place), (1, before[0]), (2, before[1]), (3, before[0]), (4, place)]
    assert float(costs.spent[place]) == sum(model.blocks[depth].decode_flops(context) for depth, context in paid)


def test_cheap_and_dear_passages():
    share = torch.tensor([0.5, 0.9, 0.7, 0.6]).repeat_interleave(10).double()
    dense = torch.arange(1, 41, dtype=torch.float64)
    cheap, dear = extremes(TokenFlops(share * dense, dense, 0), 10, 3)
    assert [one.start for one in cheap] == [0, 30]
    assert [one.start for one in dear] == [10, 20]
    assert [one.share for one in (*cheap, *dear)] == pytest.approx([0.5, 0.6, 0.9, 0.7])
    assert extremes(TokenFlops(share, dense, 0), 40, 3) == ([], [])


# --- tokens as text ---------------------------------------------------------------------------------------------------

ODD = "a 🦙日本\r\n\ttab\x00 e\u0301 \u202eright-to-left\u202c \ufffd end"


@given(st.text(min_size=1))
def test_the_pieces_joined_are_the_text(tokenizer: Tokenizer, text: str):
    shown = pieces(tokenizer, tokenizer.encode(text, add_bos=True))
    assert "".join(piece.text for piece in shown) == text
    assert shown[0].label == "start of the text"
    assert all(bool(piece.text) != bool(piece.label) for piece in shown)


def test_a_character_of_several_tokens_stands_with_the_last(tokenizer: Tokenizer):
    shown = pieces(tokenizer, tokenizer.encode("🦙"))
    assert [piece.text for piece in shown] == [*[""] * (len(shown) - 1), "🦙"]
    assert {piece.label for piece in shown[:-1]} == {"part of “🦙”"}
    assert len(shown) > 1


# --- the verb ---------------------------------------------------------------------------------------------------------


def test_inspect_tells_the_short_of_it_and_writes_the_page(longwave, folders, text: Path, tmp_path: Path):
    words = ["--against", folders["llama"], "--first", 400, "--output", tmp_path / "page.html", "--json"]
    result = longwave("inspect", folders["nested"], text, *words)
    assert result.code == 0, result.err
    model = lw.load(folders["nested"])
    assert model.tokenizer is not None
    ids = model.tokenizer.encode(text.read_text(), add_bos=True)[:400]
    levels = trace_levels(model, ids)
    for level, figures in zip(levels, result.json["levels"], strict=True):
        assert (figures["entered"], figures["kept"]) == (len(level.kept), int(level.kept.sum()))
        assert figures["own"]["block"] == figures["other"]["block"] == level.index
        assert f"level {level.index + 1}: keeps {level.kept.double().mean():.1%} of {len(level.kept)}" in result.out
        assert f"chance {figures['own']['overlap_nearby']['chance']:.1%}" in result.out
    assert f"{result.json['flops'] / result.json['dense_flops']:.1%} of the dense model's" in result.out
    assert result.json["cheapest"][0]["share"] < result.json["dearest"][0]["share"]
    page = json.loads(Page(tmp_path / "page.html").data)
    assert "".join(token[0] for token in page["tokens"]) == model.tokenizer.decode(ids)
    assert [tuple(token[1]) for token in page["tokens"]] == [token.kept for token in by_token(levels, 400)]
    assert [[one["depth"] for one in level["comparisons"]] for level in page["levels"]] == [[0, 0], [1, 1]]
    shown = page["levels"][0]["comparisons"][1]["overlap"]
    assert shown == result.json["levels"][0]["other"]["overlap"]


def test_a_model_compared_with_itself_agrees_with_itself(longwave, folders, text: Path, tmp_path: Path):
    words = ["--first", 300, "--output", tmp_path / "page.html", "--json"]
    result = longwave("inspect", folders["siblings"], text, "--against", folders["siblings"], *words)
    levels = result.json["levels"]
    assert len(levels) == 3
    assert all(level["own"] == level["other"] for level in levels)


def test_a_llama_has_attention_and_cost(longwave, folders, text: Path, tmp_path: Path):
    words = ["--layers", "5,0", "--heads", "3", "--first", 200, "--output", tmp_path / "page.html", "--json"]
    result = longwave("inspect", folders["llama"], text, *words)
    assert (result.json["levels"], result.json["cheapest"]) == ([], [])
    assert result.json["flops"] == result.json["dense_flops"]
    page = json.loads(Page(tmp_path / "page.html").data)
    assert [(one["depth"], [each["head"] for each in one["maps"]]) for one in page["blocks"]] == [
        (0, [None, 3]),
        (5, [None, 3]),
    ]


def test_another_model_may_have_fewer_blocks(longwave, folders, text: Path, tmp_path: Path):
    model = model_of("4F subllm(0.64: F) F")
    model.tokenizer = Tokenizer.load(folders["llama"])
    lw.save(model, tmp_path / "deep")
    words = ["--against", folders["short"], "--first", 100, "--output", tmp_path / "page.html", "--json"]
    result = longwave("inspect", tmp_path / "deep", text, *words)
    assert result.json["levels"][0]["other"]["reason"] == "the other model ran no attention there"
    assert "the other model ran no attention there" in result.out


@pytest.mark.parametrize("odd", [ODD, HOSTILE, "x", "\n", "🦙", "word " * 90, "-" * 400])
def test_odd_texts_come_through_to_the_letter(longwave, folders, tmp_path: Path, monkeypatch, odd: str):
    (tmp_path / "odd.txt").write_bytes(odd.encode())
    from_file = longwave("inspect", folders["nested"], tmp_path / "odd.txt", "--output", tmp_path / "a.html")
    from_words = longwave("inspect", folders["nested"], f"--text={odd}", "--output", tmp_path / "b.html")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(odd.encode()), encoding="utf8"))
    from_stdin = longwave("inspect", folders["nested"], "-", "--output", tmp_path / "c.html")
    calm = Page(tmp_path / "a.html")
    for result, name in ((from_file, "a"), (from_words, "b"), (from_stdin, "c")):
        assert result.code == 0, result.err
        page = Page(tmp_path / f"{name}.html")
        assert "".join(token[0] for token in json.loads(page.data)["tokens"]) == odd
        assert page.tags == calm.tags
        assert "<img" not in page.text


def test_inspect_refuses(refuses, folders, text: Path, tmp_path: Path):
    def no(*words: object, says: list[str], model: Path = folders["nested"]) -> None:
        refuses("inspect", model, *words, "--output", tmp_path / "page.html", says=says)

    (tmp_path / "empty").write_text("")
    (tmp_path / "binary").write_bytes(b"\x89PNG\r\n\xff\x00")
    no(says=["give one text"])
    no(text, "--text", "both", says=["give one text"])
    no("--text", "", says=["holds no text"])
    no(tmp_path / "empty", says=["empty: holds no text"])
    no(tmp_path / "binary", says=["binary: not UTF-8"])
    no(tmp_path / "missing", says=["missing: no such file", "--text"])
    no(tmp_path, says=["is a directory"])
    no("--text", "a\udcff", says=["not valid Unicode"])
    no(text, says=["context window is 512", "--first 512"])
    no(text, "--first", 600, says=["600 tokens", "--first 512"])
    no(text, "--first", 0, says=["--first 0"])
    no("--text", "a", "--layers", "5", says=["--layers 5", "blocks 0 to 4"])
    no("--text", "a", "--layers", "one", says=["--layers one", "write 0,5"])
    no("--text", "a", "--layers", "9" * 5000, says=["--layers 999", "is no number"])
    no("--text", "a", "--heads", "4", says=["--heads 4", "heads 0 to 3"])
    no("--text", "a", "--against", tmp_path / "missing", says=["missing", "no such folder"])
    no("--text", "a", model=tmp_path / "missing", says=["missing", "no such folder"])
    no("--text", "a", "--device", "gpu", says=["device = 'gpu'"])
    no("--text", "a", "--against", folders["nested"], model=folders["llama"], says=["--against", "has no levels"])
    assert not (tmp_path / "page.html").exists()
    refuses("inspect", folders["nested"], "--text", "a", "--output", tmp_path, says=["--output", "a folder"])
    refuses(
        "inspect", folders["nested"], "--text", "a", "--output", tmp_path / "no" / "a.html", says=["there is no folder"]
    )


def test_a_byte_order_mark_is_not_inspected(longwave, folders, tmp_path: Path):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfdef f():\r\n")
    (tmp_path / "plain.txt").write_bytes(b"def f():\r\n")
    found = [
        longwave("inspect", folders["llama"], tmp_path / name, "--output", tmp_path / "page.html", "--json").json
        for name in ("bom.txt", "plain.txt")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("against", [False, True])
def test_a_diverged_model_is_not_drawn(refuses, folders, tokenizer: Tokenizer, tmp_path: Path, against: bool):
    model = model_of(NESTED)
    model.tokenizer = tokenizer
    with torch.no_grad():
        model.blocks[1].parts[1].down_proj.weight.fill_(float("nan"))
    lw.save(model, tmp_path / "diverged")
    asked = [folders["nested"], "--against", tmp_path / "diverged"] if against else [tmp_path / "diverged"]
    output = ["--output", tmp_path / "page.html"]
    refuses("inspect", *asked, "--text", "some words", *output, says=["diverged: largest hidden state = nan"], code=1)
    assert not (tmp_path / "page.html").exists()


def test_inspect_refuses_models_that_do_not_fit(refuses, folders, text: Path, tmp_path: Path):
    bare = model_of(NESTED)
    lw.save(bare, tmp_path / "bare")
    output = ["--output", tmp_path / "page.html"]
    refuses("inspect", tmp_path / "bare", "--text", "a", *output, says=["bare: no tokenizer.json"])
    refuses(
        "inspect", folders["nested"], "--text", "a", "--against", tmp_path / "bare", *output, says=["no tokenizer.json"]
    )
    bare.tokenizer = Tokenizer.train(["another text, another vocabulary"] * 9, 260)
    lw.save(bare, tmp_path / "other")
    refuses(
        "inspect",
        folders["nested"],
        "--text",
        "a",
        "--against",
        tmp_path / "other",
        *output,
        says=["another tokenizer"],
    )
    small = model_of("2F", context_window=20)
    small.tokenizer = Tokenizer.load(folders["llama"])
    lw.save(small, tmp_path / "small")
    against = ["--against", tmp_path / "small", "--first", "30"]
    refuses("inspect", folders["nested"], text, *against, *output, says=["its context window is 20", "--first 20"])
    few = model_of("2F", vocab_size=50)
    few.tokenizer = small.tokenizer
    lw.save(few, tmp_path / "few")
    refuses("inspect", tmp_path / "few", "--text", "zebra", *output, says=["vocabulary has 50 entries"])
    many = model_of("33F")
    many.tokenizer = small.tokenizer
    lw.save(many, tmp_path / "many")
    layers = ",".join(map(str, range(33)))
    refuses("inspect", tmp_path / "many", "--text", "a", "--layers", layers, *output, says=["99 maps", "at most 64"])


def test_inspect_has_help(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main(["inspect", "--help"])
    assert "usage: longwave inspect" in capsys.readouterr().out


# --- the page in a browser --------------------------------------------------------------------------------------------


def page_of(folder: Path, source: Path, where: Path, *words: object) -> Path:
    page = where / "page.html"
    assert main(["inspect", str(folder), str(source), "--output", str(page), *map(str, words)]) == 0
    return page


def test_a_browser_draws_levels_attention_and_cost(folders, text: Path, tmp_path: Path):
    page = page_of(folders["nested"], text, tmp_path, "--first", 300, "--against", folders["llama"], "--layers", "0,2")
    drawn = drawn_file(page)
    assert is_ready(drawn)
    assert drawn.count("data-index=") == 300
    assert drawn.count("<svg") == 1 + 2  # the cost, and two levels
    assert drawn.count('class="map"') == 2 * 3
    assert "block 1 of this model" in drawn
    assert "block 0 of " + str(folders["llama"]) in drawn


@pytest.mark.parametrize("odd", [ODD, HOSTILE, "x"])
@pytest.mark.parametrize("name", ["nested", "llama"])
def test_a_browser_shows_odd_texts_as_text(folders, tmp_path: Path, name: str, odd: str):
    (tmp_path / "odd.txt").write_bytes(odd.encode())
    drawn = drawn_file(page_of(folders[name], tmp_path / "odd.txt", tmp_path))
    assert is_ready(drawn)
    assert "<img" not in drawn


def test_hovering_and_the_keyboard_read_tokens_and_cells(folders, text: Path, tmp_path: Path):
    poke = """
      const root = document.documentElement.dataset, words = () => find("tip").textContent, text = find("passage-text");
      const fire = (host, kind, init) => host.dispatchEvent(new kind(init.type, { bubbles: true, ...init }));
      fire(text.querySelector("[data-index='5']"), PointerEvent, { type: "pointerover" });
      root.token = words();
      fire(text, KeyboardEvent, { type: "keydown", key: "End" });
      const field = document.querySelector(".map .field");
      requestAnimationFrame(() => {
        root.last = words();
        fire(field, KeyboardEvent, { type: "keydown", key: "ArrowUp" });
        root.cell = words();
      });
      const before = getComputedStyle(document.body).backgroundColor;
      find("theme").click();
      root.switched = before !== getComputedStyle(document.body).backgroundColor;
      for (const { value } of find("shade").options) {
        find("shade").value = value;
        find("shade").dispatchEvent(new Event("change"));
      }
      for (const button of document.querySelectorAll("button")) button.click();
    """
    page = page_of(folders["nested"], text, tmp_path, "--first", 60)
    data = json.loads(Page(page).data)
    drawn = drawn_file(page, poke)
    root = drawn[drawn.index("<html") : drawn.index("<head")]
    assert is_ready(drawn), root
    assert "token 6" in root
    assert f"{data['tokens'][5][2][0]:.3f}".replace("-0.000", "0.000") in root
    assert "token 60" in root
    assert "of the attention of token 59" in root
    assert 'data-switched="true"' in root


def test_a_map_knows_what_a_window_hides(folders, text: Path, tmp_path: Path):
    poke = """
      const words = (row, column) => cellWords(blocks.at(-1), row, column, 0.5).map(node => node.textContent).join(" ");
      document.documentElement.dataset.cells = [words(20, 3), words(3, 20), words(20, 18)].join("|");
    """
    page = page_of(folders["siblings"], text, tmp_path, "--first", 120, "--layers", "3")
    drawn = drawn_file(page, poke)
    assert is_ready(drawn)
    hidden, later, seen = drawn[drawn.index('data-cells="') :].split('"')[1].split("|")
    assert hidden.startswith("out of the window")
    assert later.startswith("later")
    assert seen.startswith("50.0%")
    assert "×2.50 an even spread, which would be 20.00%" in seen  # noqa: RUF001


@pytest.mark.slow
def test_ten_thousand_tokens_are_drawn_at_once(tokenizer: Tokenizer, tmp_path: Path):
    model = model_of(NESTED, context_window=10_000)
    model.tokenizer = tokenizer
    lw.save(model, tmp_path / "model")
    (tmp_path / "long.txt").write_text("".join(path.read_text() for path in sorted(runs.corpus().rglob("*.py"))))
    page = page_of(tmp_path / "model", tmp_path / "long.txt", tmp_path, "--first", 10_000)
    assert page.stat().st_size < 4_000_000
    drawn = drawn_file(page)
    assert is_ready(drawn)
    assert drawn.count("data-index=") == 10_000
