"""Generation: the same as plain forwards, alone and in company; sampling by distribution; stops, streams and limits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from math import exp
from pathlib import Path

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import longwave as lw
from longwave.config import build
from longwave.data.tokenizer import StreamDecoder, Tokenizer
from longwave.engine import generation
from longwave.engine.generation import Emitted, Generation
from longwave.engine.sampling import Sampling, choose_token
from longwave.engine.scheduler import Piece, Scheduler
from longwave.errors import UserError
from longwave.inference.text import Writer, complete, generate_text
from longwave.model import Decoder
from longwave.resamplers import Kept
from longwave.streams import Stream
from longwave.training.recipe import Recipe

WINDOW = runs.WINDOW
every_model = pytest.mark.parametrize("kind", runs.MODELS)
WARM = Sampling(temperature=1.0, seed=5)


@cache
def tiny(kind: str) -> Decoder:
    """A random model in fp64, in which no rounding can turn an argmax, with weights large enough to have opinions."""
    config = build(Recipe, runs.values(kind), "tests").model
    model = Decoder(config, seed=3).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
    return model


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(runs.prepared())


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, runs.VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def continued(model: Decoder, prompts: Sequence[Sequence[int]], count: int = 20, **options) -> list[list[int]]:
    """The tokens that each prompt is given."""
    texts: list[list[int]] = [[] for _ in prompts]
    for prompt, token in Generation(model, prompts, max_new_tokens=count, **options):
        texts[prompt].append(token)
    return texts


@torch.no_grad()
def by_full_forwards(model: Decoder, prompt: list[int], choose: Callable[[torch.Tensor, int], int]) -> list[int]:
    """Twenty tokens, each chosen from the logits of a whole forward without any state."""
    tokens = list(prompt)
    for _ in range(20):
        tokens.append(choose(model(torch.tensor(tokens), Stream.of([len(tokens)]))[-1], len(tokens)))
    return tokens[len(prompt) :]


PROMPTS = [prompt_of(9), prompt_of(1, 1), prompt_of(30, 2), prompt_of(17, 3)]


# --- the same as plain forwards ---------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("length", [1, 13, 40])
def test_greedy_is_the_argmax_of_full_forwards(kind: str, length: int):
    model, prompt = tiny(kind), prompt_of(length)
    expected = by_full_forwards(model, prompt, lambda logits, place: int(logits.argmax()))
    assert continued(model, [prompt]) == [expected]


@every_model
def test_sampling_is_the_draw_from_full_forwards(kind: str):
    model, prompt = tiny(kind), prompt_of(13)
    expected = by_full_forwards(model, prompt, lambda logits, place: choose_token(logits, WARM, 0, place))
    assert continued(model, [prompt], sampling=WARM) == [expected]
    assert len(set(expected)) > 10


@pytest.mark.parametrize("kind", ["published", "causal"])
def test_the_tiny_models_keep_some_tokens_and_drop_some(kind: str):
    """Otherwise the tests here would say nothing about subsampling."""
    model = tiny(kind)
    kept = Kept.of(model.resamplers)
    with model.watching(kept):
        continued(model, [prompt_of(13)])
    assert len(kept.shares) == 2
    assert all(0.2 < share < 0.8 for share in kept.shares)


# --- company ----------------------------------------------------------------------------------------------------------


@every_model
def test_several_prompts_at_once_are_each_alone(kind: str):
    model = tiny(kind)
    assert continued(model, PROMPTS) == [continued(model, [prompt])[0] for prompt in PROMPTS]


@every_model
def test_what_is_drawn_depends_on_the_place_among_the_prompts_and_not_on_who_else_is_there(kind: str):
    """Draws are keyed by the prompt's index: the first is as alone, and equal prompts are given different texts."""
    model = tiny(kind)
    together = continued(model, PROMPTS, sampling=WARM)
    assert together[0] == continued(model, PROMPTS[:1], sampling=WARM)[0]
    others = [PROMPTS[2], PROMPTS[1], PROMPTS[0], PROMPTS[3]]
    assert continued(model, others, sampling=WARM)[1] == together[1]
    assert continued(model, others, sampling=WARM)[3] == together[3]
    twins = continued(model, [PROMPTS[0], PROMPTS[0]], sampling=WARM)
    assert twins[0] != twins[1]


@every_model
def test_a_neighbour_that_ends_early_changes_nothing(kind: str):
    model = tiny(kind)
    whole = continued(model, PROMPTS, sampling=WARM)
    end = whole[0][4]
    cut = continued(model, PROMPTS, sampling=WARM, stop_tokens={end})
    assert cut == [text[: text.index(end) + 1] if end in text else text for text in whole]
    assert len(cut[0]) <= 5
    assert any(len(text) == 20 for text in cut)


def test_a_caller_can_end_one_sequence():
    whole = continued(tiny("published"), PROMPTS, sampling=WARM)
    generation = Generation(tiny("published"), PROMPTS, max_new_tokens=20, sampling=WARM)
    texts: list[list[int]] = [[] for _ in PROMPTS]
    for prompt, token in generation:
        texts[prompt].append(token)
        if prompt == 2 and len(texts[2]) == 3:
            generation.stop(2)
    assert texts == [whole[0], whole[1], whole[2][:3], whole[3]]


# --- limits -----------------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("chunk", [3, 29])
def test_prefill_in_chunks_is_prefill_at_once(kind: str, chunk: int, monkeypatch):
    model = tiny(kind)
    expected, steps = continued(model, PROMPTS), list[int]()
    plan = Scheduler.plan

    def noted(scheduler: Scheduler) -> list[Piece]:
        pieces = plan(scheduler)
        steps.append(sum(piece.length for piece in pieces))
        return pieces

    monkeypatch.setattr(Scheduler, "plan", noted)
    monkeypatch.setattr(generation, "STEP_TOKENS", chunk)
    assert continued(model, PROMPTS) == expected
    assert max(steps) == max(chunk, len(PROMPTS) + 1)
    assert sum(steps) == sum(map(len, PROMPTS)) + len(PROMPTS) * (20 - 1)


@pytest.mark.parametrize(("length", "count"), [(WINDOW, 1), (WINDOW - 1, 2), (WINDOW - 10, 11)])
def test_generation_ends_at_the_context_window(length: int, count: int):
    """Every token that is run has a place in the window; the last one emitted need not be run."""
    assert [len(text) for text in continued(tiny("published"), [prompt_of(length)], 1000)] == [count]


def test_generation_ends_after_max_new_tokens():
    assert [len(text) for text in continued(tiny("llama"), PROMPTS, 7)] == [7, 7, 7, 7]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[5], [2] * (WINDOW + 1)], rf"prompt 2 has {WINDOW + 1} tokens; the model's context_window is {WINDOW}"),
        ([[5], []], "prompt 2 is empty"),
        ([[runs.VOCABULARY]], "prompt 1 has a token outside the model's vocabulary of 300"),
        ([[3, -1]], "prompt 1 has a token outside"),
    ],
)
def test_a_prompt_that_does_not_fit_is_refused(prompts: list[list[int]], message: str):
    with pytest.raises(UserError, match=message):
        Generation(tiny("llama"), prompts, max_new_tokens=1)


def test_no_new_tokens_is_refused():
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        Generation(tiny("llama"), [[5]], max_new_tokens=0)


# --- sampling ---------------------------------------------------------------------------------------------------------

LOGITS = torch.tensor([0.3, 2.0, -1.0, 1.1, 2.4, 0.0, -3.0, 1.1], dtype=torch.float64)
DRAWS = 4000


def truncated(sampling: Sampling) -> dict[int, float]:
    """The distribution that the settings speak of, in plain Python."""
    ranked = sorted(range(len(LOGITS)), key=lambda token: -float(LOGITS[token]))[: sampling.top_k]
    weights = {token: exp(float(LOGITS[token]) / sampling.temperature) for token in ranked}
    whole, held, kept = sum(weights.values()), 0.0, {}
    for token in ranked:
        if held / whole >= sampling.top_p:
            break
        kept[token], held = weights[token], held + weights[token]
    return {token: weight / held for token, weight in kept.items()}


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(1.0, seed=1),
        Sampling(0.7, top_k=3),
        Sampling(2.5, top_p=0.8),
        Sampling(1.3, top_k=6, top_p=0.7, seed=9),
        Sampling(1.0, top_k=100),
    ],
)
def test_tokens_are_drawn_from_the_truncated_distribution(sampling: Sampling):
    expected = truncated(sampling)
    drawn = Counter(choose_token(LOGITS, sampling, 0, place) for place in range(DRAWS))
    assert set(drawn) == set(expected)
    chi = sum((drawn[token] - DRAWS * share) ** 2 / (DRAWS * share) for token, share in expected.items())
    assert chi < {1: 10.8, 2: 13.8, 3: 16.3, 4: 18.5, 5: 20.5, 6: 22.5, 7: 24.3}[len(expected) - 1]  # p = 0.001


def test_a_wrong_distribution_would_fail_the_test_above():
    drawn = Counter(choose_token(LOGITS, Sampling(1.0), 0, place) for place in range(DRAWS))
    expected = truncated(Sampling(1.15))
    chi = sum((drawn[token] - DRAWS * share) ** 2 / (DRAWS * share) for token, share in expected.items())
    assert chi > 24.3


def test_top_p_takes_the_fewest_tokens_that_hold_enough():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    for top_p, support in [(0.49, {0}), (0.51, {0, 1}), (0.76, {0, 1, 2}), (0.99, {0, 1, 2, 3}), (1e-9, {0})]:
        found = {choose_token(logits, Sampling(1.0, top_p=top_p), 0, place) for place in range(300)}
        assert found == support


def test_top_1_is_greedy_at_any_temperature():
    assert {choose_token(LOGITS, Sampling(50.0, top_k=1), 0, place) for place in range(50)} == {4}


def test_draws_differ_by_seed_sequence_and_place_and_repeat():
    flat = torch.zeros(1 << 16)
    keys = [(seed, sequence, place) for seed in range(3) for sequence in range(3) for place in range(3)]
    drawn = [choose_token(flat, Sampling(1.0, seed=seed), sequence, place) for seed, sequence, place in keys]
    again = [choose_token(flat, Sampling(1.0, seed=seed), sequence, place) for seed, sequence, place in keys]
    assert drawn == again
    assert len(set(drawn)) == len(keys)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 5}, "top_k, top_p and min_p have no effect at temperature = 0"),
        ({"top_p": 0.9}, "top_k, top_p and min_p have no effect at temperature = 0"),
        ({"min_p": 0.1}, "top_k, top_p and min_p have no effect at temperature = 0"),
        ({"temperature": 1.0, "min_p": 2.0}, r"min_p = 2\.0"),
        ({"presence_penalty": float("inf")}, "presence_penalty = inf"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty = nan"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty = 0\.0"),
        ({"logit_bias": {3: float("inf")}}, "logit_bias of token 3 = inf"),
        ({"temperature": -0.5}, r"temperature = -0\.5"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k = 0"),
        ({"temperature": 1.0, "top_p": 0.0}, r"top_p = 0\.0"),
        ({"temperature": 1.0, "top_p": 1.5}, r"top_p = 1\.5"),
    ],
)
def test_settings_without_sense_are_refused(values: dict[str, float], message: str):
    with pytest.raises(UserError, match=message):
        Sampling(**values)


# --- text -------------------------------------------------------------------------------------------------------------


def text_of(kind: str, prompts: Sequence[str] = ("def main(",), **options) -> list[str]:
    return complete(tiny(kind), tokenizer(), prompts, **{"max_new_tokens": 25, "sampling": WARM, **options})


@every_model
def test_streamed_pieces_joined_are_the_decoding_of_all_tokens(kind: str):
    """Random models speak in broken UTF-8, so that half characters are held back too."""
    prompts = ["def main(", "", "# ünï"]
    streamed = ["", "", ""]
    pieces = list(generate_text(tiny(kind), tokenizer(), prompts, max_new_tokens=40, sampling=WARM))
    for piece in pieces:
        streamed[piece.prompt] += piece
    encoded = [tokenizer().encode(prompt, add_bos=True) for prompt in prompts]
    ids = continued(tiny(kind), encoded, 40, sampling=WARM, stop_tokens={tokenizer().eos_id})
    assert streamed == [tokenizer().decode(one) for one in ids]
    assert len(pieces) > 50
    assert {piece.prompt for piece in pieces if piece.ended} == {0, 1, 2}


@cache
def whole_text() -> str:
    return text_of("published")[0]


@settings(max_examples=10)
@given(start=st.integers(0, 20), length=st.integers(1, 12))
def test_a_stop_string_ends_the_text_wherever_tokens_end(start: int, length: int):
    stop = whole_text()[start : start + length]
    assert stop
    assert text_of("published", stop=[stop]) == [whole_text()[: whole_text().find(stop)]]


def test_the_first_of_several_stop_strings_ends_the_text():
    whole = whole_text()
    stops = [whole[20:23], whole[10:13]]
    assert text_of("published", stop=stops) == [whole[: min(map(whole.find, stops))]]


def test_a_stop_string_that_never_comes_changes_nothing():
    whole = whole_text()
    assert text_of("published", stop=[whole[-3:] + "never"]) == [whole]


def test_a_stopped_text_takes_no_further_steps_and_leaves_the_others_alone():
    prompts = ["def main(", "class A:"]
    whole = text_of("llama", prompts)
    stop = whole[0][3:6]
    assert stop not in whole[1]
    assert text_of("llama", prompts, stop=[stop]) == [whole[0][: whole[0].find(stop)], whole[1]]


class Spelt(StreamDecoder):
    """A decoder whose tokens are already text."""

    def __init__(self) -> None:
        pass

    def push(self, id: int) -> str:
        return chr(id)

    def finish(self) -> str:
        return ""


def written(pieces: Sequence[str], stops: Sequence[str]) -> tuple[str, bool]:
    writer, text = Writer(Spelt(), stops), ""
    for piece in pieces:
        text += writer._release(piece)
        if writer.stopped:
            break
    return text + writer.finish(), writer.stopped


small = st.text("ab", min_size=1, max_size=4)


@given(pieces=st.lists(small, max_size=12), stop=small)
def test_one_stop_string_in_any_pieces(pieces: list[str], stop: str):
    whole = "".join(pieces)
    expected = (whole[: whole.find(stop)], True) if stop in whole else (whole, False)
    assert written(pieces, [stop]) == expected


@given(whole=st.text("ab", max_size=20), stops=st.lists(small, min_size=1, max_size=4))
def test_of_overlapping_stop_strings_the_one_that_is_complete_first_counts(whole: str, stops: list[str]):
    met = [end for end in range(len(whole) + 1) if any(whole[:end].endswith(stop) for stop in stops)]
    if met:
        expected = min(whole[: met[0]].find(stop) for stop in stops if stop in whole[: met[0]])
        assert written(list(whole), stops) == (whole[:expected], True)
    else:
        assert written(list(whole), stops) == (whole, False)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="a stop string is empty"):
        text_of("llama", stop=["x", ""])


@every_model
def test_the_same_seed_gives_the_same_text_and_another_seed_another(kind: str):
    texts = [text_of(kind, sampling=Sampling(1.0, seed=seed)) for seed in (5, 5, 6)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


# --- the public face --------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("format", ["longwave", "own"])
def test_a_saved_model_says_the_same_when_loaded(kind: str, format: str, tmp_path: Path):
    foreign = "llama" if kind == "llama" else "longwave"
    model = tiny(kind)
    model.tokenizer = tokenizer()
    lw.save(model, tmp_path / "model", format=foreign if format == "own" else format)
    loaded = lw.load(tmp_path / "model")
    assert loaded.embed.weight.dtype == torch.float64
    for options in ({}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "seed": 3}):
        said = lw.generate(loaded, "import ", max_new_tokens=25, **options)
        assert said == lw.generate(model, "import ", max_new_tokens=25, **options)
        assert said
    cut = lw.generate(loaded, "import ", max_new_tokens=25, stop=(said[4:7],), **options)
    assert cut == said[: said.find(said[4:7])]


def test_the_former_name_of_the_format_says_the_new_one(tmp_path: Path):
    with pytest.warns(DeprecationWarning, match="write format='llama'"):
        lw.save(tiny("llama"), tmp_path / "model", layout="llama")
    assert json.loads((tmp_path / "model/config.json").read_text())["model_type"] == "llama"


def test_a_model_can_be_loaded_in_another_dtype(tmp_path: Path):
    model = tiny("llama")
    model.tokenizer = tokenizer()
    lw.save(model, tmp_path / "model")
    loaded = lw.load(tmp_path / "model", dtype=torch.bfloat16)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.bfloat16}
    assert lw.generate(loaded, "import ", max_new_tokens=3)


def test_a_model_without_a_tokenizer_cannot_speak(tmp_path: Path):
    model = Decoder(tiny("llama").config)
    lw.save(model, tmp_path / "model")
    with pytest.raises(UserError, match="this model has no tokenizer"):
        lw.generate(lw.load(tmp_path / "model"), "import ")


def test_a_prompt_too_long_for_the_window_is_refused_as_text(tmp_path: Path):
    model = tiny("llama")
    model.tokenizer = tokenizer()
    with pytest.raises(UserError, match=rf"prompt 1 has \d+ tokens; the model's context_window is {WINDOW}"):
        lw.generate(model, "import " * 200)


def test_emitted_tokens_name_their_prompt():
    """In the order of the prompts, a token of each that is still under way, whichever have ended before."""
    whole = continued(tiny("llama"), PROMPTS, 6)
    generation, emitted = Generation(tiny("llama"), PROMPTS, max_new_tokens=6), list[Emitted]()
    for one in generation:
        emitted.append(one)
        if [earlier.prompt for earlier in emitted].count(1) == 3:
            generation.stop(1)
    under_way = [(prompt, place) for place in range(6) for prompt in range(4) if prompt != 1 or place < 3]
    assert emitted == [Emitted(prompt=prompt, token=whole[prompt][place]) for prompt, place in under_way]
