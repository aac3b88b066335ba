"""Every way of `generate` on longwave models: what a cache, a draft or a padded batch must never change."""

from typing import Any

import pytest
import torch
from hf_models import LAYOUTS, LENGTHS, RETURNING, ROWS, alone, decoder, greedy, padded, wrapped
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StoppingCriteria

from longwave.config import ModelConfig, build
from longwave.errors import UserError
from longwave.hf import LongwaveCache, LongwaveForCausalLM
from longwave.model import Decoder
from longwave.resamplers import Kept
from longwave.states import extents

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_returning_layout = pytest.mark.parametrize("layout", RETURNING)
GREEDY = {"do_sample": False, "max_new_tokens": 24}


def draft_of(layout: str, noise: float = 0.03) -> LongwaveForCausalLM:
    """The model with its weights shaken, so that it drafts well now and then."""
    model, generator = decoder(layout), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            weight.add_(noise * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return wrapped(model)


@pytest.fixture
def crops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What every cache was asked to forget; states are so tight that windows move all the time."""
    monkeypatch.setattr(extents, "_SMALLEST", 1)
    counts: list[int] = []
    crop = LongwaveCache.crop
    monkeypatch.setattr(LongwaveCache, "crop", lambda self, count: (counts.append(int(count)), crop(self, count))[1])
    return counts


@every_returning_layout
def test_assisted_greedy_is_greedy(layout: str, crops: list[int]):
    """Token for token; drafts were cut off at several lengths, at every level and in windows that had moved on."""
    draft = draft_of(layout)
    draft.generation_config.num_assistant_tokens = 6
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    for row in ROWS[:2]:
        made = wrapped(decoder(layout)).generate(row[None], assistant_model=draft, **GREEDY)
        assert made[0, 12:].tolist() == greedy(decoder(layout), row, 24)
    assert len({count for count in crops if count < 0}) > 2
    assert 0 in crops


@every_returning_layout
def test_prompt_lookup_is_greedy(layout: str, crops: list[int]):
    prompt = torch.cat([ROWS[0], ROWS[0]])
    made = wrapped(decoder(layout)).generate(prompt[None], prompt_lookup_num_tokens=4, **GREEDY)
    assert made[0, 24:].tolist() == greedy(decoder(layout), prompt, 24)
    assert min(crops) < 0


def test_longwave_and_transformers_assist_each_other():
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "initializer_range": 0.4}
    theirs = LlamaForCausalLM(LlamaConfig(vocab_size=31, num_hidden_layers=2, eos_token_id=None, **shape)).eval()
    theirs.generation_config.eos_token_id = None
    theirs, ours = theirs.double(), wrapped(decoder("subllm"))
    for target, draft in ((ours, theirs), (theirs, ours)):
        made = target.generate(ROWS[:1], assistant_model=draft, **GREEDY)
        assert torch.equal(made, target.generate(ROWS[:1], **GREEDY))


@every_returning_layout
def test_assisted_sampling_runs_from_a_left_padded_prompt(layout: str):
    """The draw is another one than without a draft; that it ends well formed is what can be said."""
    ids, mask = padded("left")
    torch.manual_seed(0)
    made = wrapped(decoder(layout)).generate(
        ids[3:], attention_mask=mask[3:], assistant_model=draft_of(layout), do_sample=True, max_new_tokens=9
    )
    assert made.shape == (1, 12 + 9)


@every_returning_layout
def test_assisted_greedy_from_a_left_padded_prompt(layout: str):
    ids, mask = padded("left")
    made = wrapped(decoder(layout)).generate(
        ids[3:], attention_mask=mask[3:], assistant_model=draft_of(layout), **GREEDY
    )
    assert made[0, 12:].tolist() == greedy(decoder(layout), ROWS[3, : LENGTHS[3]], 24)


def test_drafts_for_recurrent_layers_are_refused():
    ours, draft = wrapped(decoder("hybrid")), draft_of("llama")
    either: tuple[dict[str, Any], ...] = ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 2})
    for options in either:
        with pytest.raises(UserError, match=r"drafts cannot be taken back by layers.*; leave out assistant_model"):
            ours.generate(ROWS[:1], **options, **GREEDY)
    with pytest.raises(UserError, match="drafts cannot be taken back by layers"):
        wrapped(decoder("llama")).generate(ROWS[:1], assistant_model=ours, **GREEDY)
    assert [LongwaveCache(decoder(name), 1).is_croppable for name in LAYOUTS] == [name != "hybrid" for name in LAYOUTS]


@pytest.mark.parametrize("side", ["left", "right"])
@every_layout
def test_sampling_draws_the_same_with_and_without_a_cache(layout: str, side: str):
    ours, (ids, mask) = wrapped(decoder(layout)), padded(side)
    options = {"attention_mask": mask, "do_sample": True, "top_k": 9, "temperature": 0.7, "max_new_tokens": 12}
    made = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        made.append(ours.generate(ids, use_cache=use_cache, num_return_sequences=3, **options))
    assert torch.equal(*made)
    assert made[0].shape == (12, 24)
    assert not torch.equal(made[0][0], made[0][1])


@every_layout
def test_scores_are_the_logits_of_each_row_alone(layout: str):
    ids, mask = padded("left")
    result = wrapped(decoder(layout)).generate(
        ids, attention_mask=mask, output_scores=True, output_logits=True, return_dict_in_generate=True, **GREEDY
    )
    assert len(result.scores) == len(result.logits) == 24
    for row, length in enumerate(LENGTHS):
        whole = torch.cat([ROWS[row, :length], result.sequences[row, 12:-1]])
        expected = alone(decoder(layout), whole)[length - 1 :]
        torch.testing.assert_close(torch.stack([step[row] for step in result.logits]), expected.float())


@every_layout
def test_beams_are_those_without_a_cache(layout: str):
    ours, (ids, mask) = wrapped(decoder(layout)), padded("left")
    options = {"num_beams": 4, "num_return_sequences": 2, "attention_mask": mask, **GREEDY, "max_new_tokens": 10}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    cached, uncached = ours.generate(ids, **options), ours.generate(ids, use_cache=False, **options)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.sequences_scores, uncached.sequences_scores)
    assert torch.equal(cached.beam_indices, uncached.beam_indices)


class AfterToken(StoppingCriteria):
    """Stops each row once it has made a certain token."""

    def __init__(self, token: int, prompt: int) -> None:
        self.token, self.prompt = token, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return (input_ids[:, self.prompt :] == self.token).any(1)


@every_layout
def test_stopping_criteria_stop(layout: str):
    expected = greedy(decoder(layout), ROWS[0], 24)
    token = expected[7]
    made = wrapped(decoder(layout)).generate(ROWS[:1], stopping_criteria=[AfterToken(token, 12)], **GREEDY)
    assert made[0, 12:].tolist() == expected[: expected.index(token) + 1]


@every_layout
def test_prefill_in_chunks_changes_nothing(layout: str):
    ours, (ids, mask) = wrapped(decoder(layout)), padded("left")
    whole = ours.generate(ids, attention_mask=mask, **GREEDY)
    assert torch.equal(ours.generate(ids, attention_mask=mask, prefill_chunk_size=5, **GREEDY), whole)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"cache_implementation": "static"}, "cache_implementation = 'static' is not supported"),
        ({"assistant_early_exit": 1}, "assistant_early_exit = 1 is not supported"),
        ({"output_hidden_states": True, "return_dict_in_generate": True}, "output_hidden_states: blocks inside"),
        ({"output_attentions": True, "return_dict_in_generate": True}, "output_attentions is not supported"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_generate_cannot_do_is_refused(options: dict[str, Any], named: str):
    with pytest.raises(UserError, match=named):
        wrapped(decoder("subllm")).generate(ROWS[:1], max_new_tokens=2, **options)


def test_crop_says_what_it_takes():
    cache = LongwaveCache(decoder("llama"), 1)
    with pytest.raises(UserError, match="tokens_to_remove = 3"):
        cache.crop(3)


@pytest.mark.parametrize("side", ["left", "right"])
@every_layout
def test_rows_of_a_padded_batch_are_within_1e_5_of_each_alone_in_single_precision(layout: str, side: str):
    """Prefill, then eight decoding steps; the weights are those of a fresh model of moderate width."""
    shape = {"vocab_size": 300, "hidden_size": 64, "mlp": {"size": 160}, "init": {"std": 0.08}}
    attention = {"heads": 4, "kv_heads": 2}
    model = Decoder(build(ModelConfig, {**shape, **LAYOUTS[layout], "attention": attention}, "test")).eval()
    rows, ids, mask = batch(300, side)
    with torch.no_grad(), model.watching(kept := Kept.of(model.resamplers)):
        steps = in_steps(wrapped(model), ids, mask, torch.stack([row[-8:] for row in rows]))
        for row, tokens in enumerate(rows):
            expected = alone(model, tokens)[len(tokens) - 9 :]
            assert (steps[:, row] - expected).abs().max() < 1e-5
        if layout == "subllm":
            assert len(kept.shares) == 2
            assert all(0 < share < 1 for share in kept.shares)


def batch(vocabulary: int, side: str) -> tuple[list[Tensor], Tensor, Tensor]:
    """Rows of several lengths, of which the last eight tokens are left to decode; the others padded, and their mask."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(0, vocabulary, (length + 8,), generator=generator) for length in (70, 1, 23, 40)]
    ids, mask = torch.zeros(4, 70, dtype=torch.int64), torch.zeros(4, 70, dtype=torch.int64)
    for row, tokens in enumerate(rows):
        place = slice(70 - len(tokens) + 8, None) if side == "left" else slice(0, len(tokens) - 8)
        ids[row, place], mask[row, place] = tokens[:-8], 1
    return rows, ids, mask


def in_steps(ours: LongwaveForCausalLM, ids: Tensor, mask: Tensor, following: Tensor) -> Tensor:
    """Logits (9, B, V): after the prompt, and after each of the following tokens (B, 8)."""
    output = ours(ids, attention_mask=mask)
    logits = [output.logits[:, -1]]
    for token in following.split(1, dim=1):
        mask = torch.cat([mask, torch.ones_like(token)], dim=1)
        output = ours(token, attention_mask=mask, cache=output.to_tuple()[-1])
        logits.append(output.logits[:, -1])
    return torch.stack(logits)
