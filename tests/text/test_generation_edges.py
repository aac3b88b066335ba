"""What leaves a model as text: why it ends, stops of every kind, broken logits, and calls that do not fit."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

import longwave as lw
from longwave.config import build
from longwave.data.tokenizer import StreamDecoder, Tokenizer
from longwave.engine import choosing
from longwave.engine.generation import Generation
from longwave.engine.sampling import Sampling, choose_token
from longwave.errors import MachineError, UserError, one_line
from longwave.model import Decoder
from longwave.streams import Stream
from longwave.training.recipe import Recipe

WINDOW, END = runs.WINDOW, "<|end|>"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The corpus' tokenizer with one special token more, which no folder calls an end."""
    backend = Tokenizer.load(runs.prepared()).twin()
    backend.add_tokens([AddedToken(END, special=True, normalized=False)])
    return Tokenizer(backend, {"bos_token": "<|bos|>", "eos_token": "<|eos|>"})


@pytest.fixture
def model(tokenizer: Tokenizer) -> Decoder:
    values = runs.values("llama")
    values["model"]["vocab_size"] = tokenizer.vocab_size
    model = Decoder(build(Recipe, values, "tests").model, seed=3).double()
    model.tokenizer = tokenizer
    return model


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> Callable[[str], None]:
    """Makes every model say a text, in which the names of special tokens are these tokens."""

    def say(text: str) -> None:
        ids = tokenizer.twin().encode(text, add_special_tokens=False).ids
        starts: dict[int, int] = {}

        def scripted(logits: Any, sampling: Any, prompt: int, place: int) -> int:
            return ids[place - starts.setdefault(prompt, place)]

        monkeypatch.setattr(choosing, "choose_token", scripted)
        monkeypatch.setattr(choosing.Chooser, "is_plain", False)

    return say


@pytest.fixture
def unchecked() -> Iterator[None]:
    """While a test runs, types are not checked, as they are not where people work."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


# --- why a text ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "options", "text", "ended"),
    [
        ("one two", {"max_new_tokens": 2}, None, "max_new_tokens"),
        ("one two" + "<|eos|>", {}, "one two", "end_token"),
        ("one two", {"stop": "two"}, "one ", "stop"),
        ("one two", {"stop": ["no", "e t"]}, "on", "stop"),
        (f"one{END} two", {"stop": END}, "one", "stop"),
        (f"one{END} two<|eos|>", {"stop": "<|eos|>"}, "one two", "stop"),
        (f"one{END} two<|eos|>", {"stop": f"{END} t"}, "one", "stop"),
        (f"one{END} two<|eos|>", {"stop": f"ne{END}"}, "o", "stop"),
        (f"one{END} two<|eos|>", {"stop": f"ne{END}X"}, "one two", "end_token"),
        (f"one{END} two<|eos|>", {}, "one two", "end_token"),
        ("x" * 500, {"max_new_tokens": 500}, None, "context_window"),
    ],
)
def test_a_text_ends_where_it_should_and_says_why(model, says, said, options, text, ended):
    says(said)
    found = lw.generate(model, "def", **options)
    assert found.ended == ended
    assert text is None or found == text
    assert lw.generate(model, ["def", "class A"], **options)[1].ended == ended


def test_the_window_is_told_apart_from_the_limit(model: Decoder):
    for length, most, ended in [(WINDOW, 1, "max_new_tokens"), (WINDOW, 2, "context_window"), (3, 4, "max_new_tokens")]:
        generation = Generation(model, [[5] * length], max_new_tokens=most)
        list(generation)
        assert generation.ended == {0: ended}


def test_pieces_joined_are_the_text_and_the_last_one_says_why(model: Decoder):
    whole = lw.generate(model, ["def", "class A"], max_new_tokens=9)
    texts, ended = ["", ""], list[Any]()
    for piece in lw.stream(model, ["def", "class A"], max_new_tokens=9):
        texts[piece.prompt] += piece
        ended += [(piece.prompt, piece.ended)] if piece.ended else []
    assert texts == whole
    assert sorted(ended) == [(0, "max_new_tokens"), (1, "max_new_tokens")]
    assert "".join(lw.stream(model, "def", max_new_tokens=9)) == lw.generate(model, "def", max_new_tokens=9)


def test_a_continuation_is_a_string_wherever_strings_go(model: Decoder):
    text = lw.generate(model, "def", max_new_tokens=5)
    assert isinstance(text, str)
    assert isinstance(text, lw.Continuation)
    assert json.loads(json.dumps([text])) == [text]
    again = pickle.loads(pickle.dumps(text))
    assert (again, again.ended) == (text, "max_new_tokens")
    assert lw.generate(model, ["def"], max_new_tokens=5) == [text]
    assert lw.generate(model, [], max_new_tokens=5) == []


def test_a_model_in_training_stays_in_training(model: Decoder):
    model.train()
    lw.generate(model, "def", max_new_tokens=3)
    next(lw.stream(model, "def", max_new_tokens=3))
    assert model.training
    assert all(part.training for part in model.modules())


def test_half_a_character_before_a_stop_token_is_shown(model: Decoder, monkeypatch: pytest.MonkeyPatch):
    half, end = model.tokenizer.encode("日")[0], model.tokenizer.twin().token_to_id(END)
    ids = iter([half, end, half, half, end])
    monkeypatch.setattr(choosing, "choose_token", lambda *_: next(ids))
    monkeypatch.setattr(choosing.Chooser, "is_plain", False)
    assert lw.generate(model, "def", stop=END) == model.tokenizer.decode([half])
    assert lw.generate(model, "def", stop=END) == model.tokenizer.decode([half, half])


# --- a continuation is not the beginning of a text --------------------------------------------------------------------

WORDS = ["▁one", "▁two", "three", "##ree", "▁", "four</w>", "<0xC3>", "<0xBC>", "!", "Ġnine", "Ã", "¼"]
DECODERS = {
    "byte level": decoders.ByteLevel(),
    "metaspace": decoders.Metaspace(),
    "llama 2": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "word pieces": decoders.WordPiece(cleanup=False),
    "bpe": decoders.BPEDecoder(),
}


def of_words(decoder: Any) -> Tokenizer:
    backend = Backend(models.WordLevel({word: id for id, word in enumerate(WORDS)}, unk_token="!"))
    backend.decoder = decoder
    return Tokenizer(backend, {})


@pytest.mark.parametrize("kind", DECODERS)
@given(ids=st.lists(st.integers(0, len(WORDS) - 1), max_size=12), cut=st.integers(0, 12))
def test_a_continuation_is_decoded_behind_its_prompt(kind: str, ids: list[int], cut: int):
    tokenizer = of_words(DECODERS[kind])
    prompt, new = ids[:cut], ids[cut:]
    before, whole = tokenizer.decode(prompt), tokenizer.decode(ids)
    if not whole.startswith(before) or before.endswith("\ufffd"):
        return  # a decoder that writes the prompt itself differently once more follows
    if kind == "llama 2" and "\ufffd" in whole:
        return  # byte fallback gives up whole characters, too, that stand beside broken ones: `StreamDecoder` does not
    decoder = StreamDecoder(tokenizer, after=prompt)
    said = "".join([*map(decoder.push, new), decoder.finish()])
    assert said.rstrip("\ufffd") == whole[len(before) :].rstrip("\ufffd")


def test_a_blank_at_the_start_of_a_continuation_stays():
    decoder = StreamDecoder(of_words(DECODERS["llama 2"]), after=[0])
    assert decoder.push(1) == " two"
    assert StreamDecoder(of_words(DECODERS["llama 2"])).push(1) == "two"


# --- logits -----------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("temperature", [0.0, 1e-307, 1.0])
@pytest.mark.parametrize(
    "logits",
    [[NAN] * 4, [1.0, NAN, 2.0, 0.0], [1.0, INF, INF, 0.0], [1.0, INF, 0.0, 0.0], [-INF] * 4, [NAN, INF]],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_logits_that_are_not_finite_are_no_token(logits: list[float], temperature: float, dtype: torch.dtype):
    with pytest.raises(MachineError, match=r"logit for token 8 of prompt 3 = (nan|-?inf): .* weights have diverged"):
        choose_token(torch.tensor(logits, dtype=dtype), Sampling(temperature), 2, 7)


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-307, 1e-30, 0.5])
def test_a_token_that_is_ruled_out_is_never_taken(temperature: float):
    logits = torch.tensor([1.0, -INF, 30.0, -INF])
    assert {choose_token(logits, Sampling(temperature), 0, place) for place in range(200)} == {2}


@given(
    st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=2, max_size=6),
    st.floats(0, 1e300, exclude_min=True),
    st.integers(0, 1 << 70),
)
def test_any_finite_logits_at_any_temperature_give_a_token(logits: list[float], temperature: float, seed: int):
    row = torch.tensor(logits)
    token = choose_token(row, Sampling(temperature, seed=seed), 0, 3)
    if (float(row.max()) - logits[token]) / temperature > 800:  # e to the minus 800 is 0
        pytest.fail(f"{token} is not among the likely ones")


@pytest.mark.parametrize("weight", ["embed.weight", "blocks.1.mlp.down_proj.weight", "norm.weight"])
def test_a_diverged_model_says_so(model: Decoder, weight: str):
    named = {name.replace("stack.layers", "blocks"): one for name, one in model.named_parameters()}
    found = next(one for name, one in named.items() if name.endswith(weight.split(".", 2)[-1]))
    with torch.no_grad():
        found.fill_(NAN)
    with pytest.raises(MachineError, match="weights have diverged, or float64 overflows"):
        lw.generate(model, "def")


# --- settings that say nothing, or cannot be --------------------------------------------------------------------------

BAD_OPTIONS = {
    "seed of nothing": ({"seed": 5}, "seed = 5 has no effect"),
    "infinitely hot": ({"temperature": INF}, "temperature = inf"),
    "hot": ({"temperature": "hot"}, "temperature"),
    "no temperature": ({"temperature": None}, "temperature"),
    "half a token": ({"temperature": 1.0, "top_k": 2.5}, "top_k"),
    "seed of half": ({"temperature": 1.0, "seed": 0.5}, "seed"),
    "unknown": ({"temprature": 1.0}, "temprature"),
    "no tokens": ({"max_new_tokens": 0}, "max_new_tokens = 0"),
    "fewer than none": ({"max_new_tokens": -5}, "max_new_tokens = -5"),
    "tokens in words": ({"max_new_tokens": "5"}, "max_new_tokens = '5'"),
    "tokens and a half": ({"max_new_tokens": 2.5}, "max_new_tokens = 2.5"),
    "no limit": ({"max_new_tokens": None}, "max_new_tokens = None"),
    "stop at nothing": ({"stop": ""}, "a stop string is empty"),
    "stop at a number": ({"stop": [5]}, "stop = 5"),
    "stop at bytes": ({"stop": [b"x"]}, "stop = b'x'"),
    "no template": ({"chat": True}, "chat_template"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
@pytest.mark.parametrize("verb", [lw.generate, lw.stream])
def test_an_option_that_cannot_be_is_refused_at_once(model, unchecked, verb: Callable[..., Any], case: str):
    options, says = BAD_OPTIONS[case]
    refused(lambda: verb(model, "def", **options), says)


BAD_PROMPTS: dict[str, tuple[Any, str]] = {
    "number": (5, "5"),
    "nothing": (None, "None"),
    "bytes": (b"def", "b'def'"),
    "a number among texts": (["def", 5], "prompt 2 = 5"),
    "half a surrogate pair": ("\ud800", "not valid Unicode"),
    "too long": ("word " * 500, "context_window is 64"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_a_prompt_that_is_no_text_is_refused(model: Decoder, unchecked, case: str):
    prompt, says = BAD_PROMPTS[case]
    refused(lambda: lw.generate(model, prompt), says)


def test_what_is_no_model_is_refused(unchecked):
    for what in ("runs/tiny/model", None, torch.nn.Linear(2, 2)):
        refused(lambda what=what: lw.generate(what, "def"), "lw.load(folder)")


def refused(call: Callable[[], object], says: str) -> None:
    """A UserError of one line that holds some words."""
    with pytest.raises(UserError) as caught:
        call()
    line = str(caught.value)
    assert says in line
    assert line == one_line(line), "one line of printable characters"


@pytest.mark.parametrize("place", ["tpu", "gpu", "", "cuda:99", "cpu:x", None, 3.5, torch.device("meta")])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, unchecked, place: Any):
    refused(lambda: lw.load(tmp_path, device=place), "device = ")


@pytest.mark.parametrize("kind", ["bf17", "", "int4", torch.int16, 16, float])
def test_a_dtype_that_no_model_runs_in_is_refused(tmp_path: Path, unchecked, kind: Any):
    refused(lambda: lw.load(tmp_path, dtype=kind), "dtype = ")


@pytest.mark.parametrize("kind", ["bf16", "bfloat16", "torch.bfloat16", torch.bfloat16])
@pytest.mark.parametrize("place", ["auto", "cpu", torch.device("cpu")])
def test_devices_and_dtypes_go_by_their_names(model: Decoder, tmp_path: Path, kind: Any, place: Any):
    lw.save(model, tmp_path / "model")
    loaded = lw.load(tmp_path / "model", dtype=kind, device=place)
    assert loaded.embed.weight.dtype == torch.bfloat16


# --- calls of a decoder -----------------------------------------------------------------------------------------------

IDS = torch.tensor([5, 6, 7])


def cases_of_calls(model: Decoder) -> dict[str, tuple[Callable[[], object], str]]:
    """Calls that do not fit, and what is said of each."""
    state, other = model.state(2), Decoder(build(Recipe, runs.values("published"), "tests").model).double().eval()
    state.stream([3], [0])
    three = Stream.of([3])
    return {
        "id too large": (lambda: model(torch.tensor([5, 999, 7]), three), "tokens from 5 to 999"),
        "negative id": (lambda: model(torch.tensor([5, -1, 7]), three), "tokens from -1 to 7"),
        "floats": (lambda: model(IDS.double(), three), "tokens of torch.float64"),
        "a batch": (lambda: model(IDS[None], three), "tokens of shape (1, 3)"),
        "fewer tokens": (lambda: model(IDS[:2], three), "tokens of shape (2,)"),
        "more tokens": (lambda: model(IDS.repeat(2), three), "tokens of shape (6,)"),
        "a number": (lambda: model(torch.tensor(5), Stream.of([1])), "tokens of shape ()"),
        "elsewhere": (lambda: model(IDS.to("meta"), three), "tokens on meta"),
        "stream elsewhere": (lambda: model(IDS, Stream.of([3], device="meta")), "stream on meta"),
        "stream of no state": (lambda: model(IDS, three, state), "state.stream(...)"),
        "state left out": (lambda: model(IDS, state.stream([3], [0])), "give it too"),
        "state of another": (lambda: other(IDS, model.state(1).stream([3]), model.state(1)), "model.state(...)"),
        "state in another dtype": (lambda: half(model), "state in torch.float64"),
        "slot too high": (lambda: state.stream([3], [2]), "slots [2]"),
        "slot twice": (lambda: state.stream([3, 3], [1, 1]), "twice"),
        "slots missing": (lambda: state.stream([3, 3], [1]), "lengths [3, 3]"),
        "negative length": (lambda: Stream.of([-1]), "lengths [-1]"),
        "half a token": (lambda: Stream.of([2.5]), "lengths [2.5]"),  # type: ignore[list-item]
        "starts missing": (lambda: Stream.of([3, 3], starts=[1]), "starts [1]"),
        "targets too few": (lambda: model.loss(IDS, IDS[:2], three), "targets of shape (2,)"),
        "targets too large": (lambda: model.loss(IDS, torch.tensor([1, 2, 999]), three), "targets from 1 to 999"),
        "ids of no prompt": (lambda: Generation(model, [5, 6], max_new_tokens=1), "prompt 1 = 5"),  # type: ignore
        "floats as ids": (lambda: Generation(model, [[5.0]], max_new_tokens=1), "prompt 1 = [5.0]"),  # type: ignore
    }


def half(model: Decoder) -> None:
    state = model.state(1)
    model.float()(IDS, state.stream([3]), state)


CALLS = list(cases_of_calls(Decoder(build(Recipe, runs.values("llama"), "tests").model).double()))


@pytest.mark.parametrize("case", CALLS)
def test_a_call_that_does_not_fit_is_refused_in_one_line(model: Decoder, unchecked, case: str):
    call, says = cases_of_calls(model)[case]
    refused(call, says)


def test_ids_may_come_in_any_row_of_integers(model: Decoder, unchecked):
    texts = [[one.token for one in Generation(model, given, max_new_tokens=4)] for given in ([[5, 6]], ((5, 6),))]
    tensors = [[one.token for one in Generation(model, IDS[None, :2], max_new_tokens=4)]]  # type: ignore[arg-type]
    assert texts[0] == texts[1] == tensors[0]


def test_perplexity_is_infinite_where_it_is_too_large():
    from longwave.evaluation.held_out import HeldOut

    assert HeldOut(2.0, 1, ()).perplexity == math.exp(2)
    assert HeldOut(800.0, 1, ()).perplexity == INF
