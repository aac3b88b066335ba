"""A longwave model as lm-eval asks it; nothing that it asks is cut to fit.

lm-eval's own adapter for `transformers` drops the beginning of a prompt that is too long, so that a few-shot prompt
loses its examples, and a needle its text, without a word. Here such a request is refused, with its size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from longwave.data.tokenizer import Tokenizer
from longwave.engine.sampling import Sampling
from longwave.errors import require
from longwave.evaluation.likelihood import log_probabilities
from longwave.inference.text import generate_text, joined
from longwave.model import Decoder
from longwave.streams import Stream

_MOST_NEW = 256  # tokens, where a task names no number


class HarnessModel(TemplateLM):
    """Answers the requests of lm-eval, one sequence at a time."""

    def __init__(self, model: Decoder, tokenizer: Tokenizer) -> None:
        super().__init__()
        self._model, self._tokens, self._window = model, tokenizer, model.config.context_window

    @property
    def eot_token_id(self) -> int:
        """The token that stands before a text without a context: what the tokenizer puts there, or eos."""
        first = self._tokens.opening[0] if self._tokens.opening else self._tokens.eos_id
        require(first is not None, "lm-eval: the tokenizer names neither a bos nor an eos token, which it needs")
        assert first is not None
        return first

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return self._tokens.encode(string, add_bos=add_special_tokens is not False)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        return [self._scored(context, answer) for _, context, answer in requests]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that do not overlap, as lm-eval defines it."""
        totals = list[float]()
        for [text] in (request.args for request in requests):
            ids = self._tokens.encode(text)
            windows = get_rolling_token_windows(ids, self.eot_token_id, self._window, 1)
            totals.append(sum(self._scored(*make_disjoint_window(pair))[0] for pair in windows))
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        return [self._generated(*request.args) for request in requests]

    @torch.no_grad()
    def _scored(self, context: list[int], answer: list[int]) -> tuple[float, bool]:
        """The log-probability of an answer, and whether every token of it is the likeliest."""
        self._require_fit(len(context) + len(answer) - 1)
        ids = torch.tensor([*context, *answer], device=self._model.embed.weight.device)
        with self._model.mode(training=False):
            hidden = self._model.hidden(ids[:-1], Stream.of([len(ids) - 1], device=ids.device))[len(context) - 1 :]
            score = float(log_probabilities(self._model, hidden, ids[len(context) :]).sum())
            greedy = bool((self._model.logits(hidden).argmax(-1) == ids[len(context) :]).all())
        return score, greedy

    def _generated(self, prompt: str, settings: dict[str, Any]) -> str:
        until, most = settings.get("until") or [], int(settings.get("max_gen_toks", _MOST_NEW))
        drawn = settings.get("do_sample", False) and settings.get("temperature", 0) > 0
        sampling = Sampling(temperature=settings["temperature"]) if drawn else Sampling()
        self._require_fit(len(self.tok_encode(prompt)) + most)
        stops = [until] if isinstance(until, str) else [one for one in until if one]
        asked = {"max_new_tokens": most, "sampling": sampling, "stop": stops}
        return joined(generate_text(self._model, self._tokens, [prompt], **asked))[0]

    def _require_fit(self, tokens: int) -> None:
        """UserError for a request that the context window does not hold; it is never cut."""
        said = (
            f"lm-eval: a prompt and its answer take {tokens:,} tokens; the model's context_window is {self._window:,}"
        )
        require(tokens <= self._window, f"{said}, and nothing is cut: ask fewer shots, or another task")
