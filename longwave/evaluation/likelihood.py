"""Log-probabilities of given tokens, of every target of a batch or several answers to a question; likeliest tokens.

Legend: `N` rows, `D` hidden size, `V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from longwave.laws import Law
from longwave.machine import not_finite
from longwave.model import Decoder
from longwave.states import State
from longwave.streams import Stream

_CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in fp32
_RUN_TOKENS = 2048  # of one sequence that run at once, which bounds the memory for activations
_BATCH_TOKENS = 1 << 14  # remembered for all sequences that are answered together
_BATCH_QUESTIONS = 32


@dataclass(frozen=True)
class Question:
    """Token ids to be continued, and the answers to choose from.

    context: what comes before every answer, one token at least. answers: the ids of each, one token at least.
    """

    context: list[int]
    answers: list[list[int]]


def log_probabilities(
    model: Decoder, hidden: Float[Tensor, "N D"], targets: Int64[Tensor, " N"]
) -> Float64[Tensor, " N"]:
    """The log-probability, in nats, of a target after each row of `Decoder.hidden`; logits are made in chunks."""
    step = _rows(model)
    pieces = zip(hidden.split(step), targets.split(step), strict=True)
    found = [_chosen(model.logits(rows), chosen) for rows, chosen in pieces]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float64)


def most_likely(model: Decoder, hidden: Float[Tensor, "N D"]) -> Int64[Tensor, " N"]:
    """The likeliest token after each row of `Decoder.hidden`; logits are made in chunks.

    MachineError for logits that are not finite.
    """
    found = [_largest(model.logits(rows)) for rows in hidden.split(_rows(model))]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.int64)


def _largest(logits: Float[Tensor, "N V"]) -> Int64[Tensor, " N"]:
    largest = logits.max(-1)
    finite = largest.values.isfinite()
    if not bool(finite.all()):
        raise not_finite("logits", float(largest.values[~finite][0]), logits.dtype)
    return largest.indices


def _rows(model: Decoder) -> int:
    """The rows whose logits are held at a time."""
    return max(1, _CHUNK_ELEMENTS // model.config.vocab_size)


def _chosen(logits: Float[Tensor, "N V"], targets: Int64[Tensor, " N"]) -> Float64[Tensor, " N"]:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(-1).gather(1, targets.unsqueeze(1)).squeeze(1).double()


@torch.no_grad()
def answer_scores(model: Decoder, questions: Sequence[Question]) -> list[list[float]]:
    """For every question the log-probability of each answer after its context, in nats.

    The beginning that all contexts share runs once, and each context once for all of its answers. A model whose result
    depends on the pieces that a sequence runs in gets every answer in one piece, as by `plain_scores`.
    """
    if any(Law.CHUNKING not in part.laws.inference for part in model.parts):
        return plain_scores(model, questions)
    with model.mode(training=False):
        shared = shared_beginning([one.context[:-1] for one in questions])
        state = model.state()
        if shared:
            _last_hidden(model, state, [shared], [0])
        found = list[list[float]]()
        for batch in _batches(questions):
            contexts = [one.context[len(shared) :] for one in batch]
            found += _answered(model, state, contexts, [one.answers for one in batch])
            state.reorder([0])
    return found


@torch.no_grad()
def plain_scores(model: Decoder, questions: Sequence[Question]) -> list[list[float]]:
    """The same, one sequence at a time and without a state: the definition, to which `answer_scores` is held."""

    def score(context: list[int], answer: list[int]) -> float:
        ids = torch.tensor(context + answer, device=model.embed.weight.device)
        stream = Stream.of([len(ids) - 1], device=ids.device)
        hidden = model.hidden(ids[:-1], stream)[len(context) - 1 :]
        return float(log_probabilities(model, hidden, ids[len(context) :]).sum())

    with model.mode(training=False):
        return [[score(one.context, answer) for answer in one.answers] for one in questions]


def shared_beginning(sequences: Sequence[Sequence[int]]) -> list[int]:
    """The longest beginning that all sequences have."""
    columns = zip(*sequences, strict=False)  # up to the end of the shortest
    return [column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns)]


def _batches(questions: Sequence[Question]) -> Iterator[list[Question]]:
    """Questions that run together: their answers remember at most `_BATCH_TOKENS` tokens, or there is only one."""
    batch, taken = list[Question](), 0
    for question in questions:
        size = sum(len(question.context) + len(answer) for answer in question.answers)
        if batch and (taken + size > _BATCH_TOKENS or len(batch) == _BATCH_QUESTIONS):
            yield batch
            batch, taken = [], 0
        batch.append(question)
        taken += size
    if batch:
        yield batch


def _answered(
    model: Decoder, state: State, contexts: list[list[int]], answers: list[list[list[int]]]
) -> list[list[float]]:
    """The scores of a batch of questions. contexts: the ids of each after those that slot 0 of the state has seen."""
    state.reorder([0] * (len(contexts) + 1))
    last = _last_hidden(model, state, contexts, range(1, len(contexts) + 1))
    owners = [number for number, several in enumerate(answers) for _ in several]
    flat = [answer for several in answers for answer in several]
    firsts = torch.tensor([answer[0] for answer in flat], device=last.device)
    scores = log_probabilities(model, last[torch.tensor(owners, device=last.device)], firsts)
    scores += _rest_scores(model, state, flat, owners)
    each = iter(scores.tolist())
    return [[next(each) for _ in several] for several in answers]


def _rest_scores(model: Decoder, state: State, answers: list[list[int]], owners: list[int]) -> Float64[Tensor, " N"]:
    """The log-probability of each answer's tokens after its first. owners: the question that each answer belongs to."""
    scores = torch.zeros(len(answers), dtype=torch.float64, device=state.device)
    longer = [number for number, answer in enumerate(answers) if len(answer) > 1]
    if longer:
        state.reorder([0, *(owners[number] + 1 for number in longer)])
        pieces = [answers[number][:-1] for number in longer]
        tokens = torch.tensor([token for piece in pieces for token in piece], device=state.device)
        targets = torch.tensor([token for number in longer for token in answers[number][1:]], device=state.device)
        stream = state.stream([len(piece) for piece in pieces], range(1, len(longer) + 1))
        found = log_probabilities(model, model.hidden(tokens, stream, state), targets)
        of_answer = torch.tensor(longer, device=state.device).index_select(0, stream.runs.of_token)
        scores.index_add_(0, of_answer, found)
    return scores


def _last_hidden(
    model: Decoder, state: State, pieces: Sequence[list[int]], slots: Sequence[int]
) -> Float[Tensor, "N D"]:
    """Runs a piece of tokens of each slot's sequence, long ones in steps; the hidden state of each last token."""
    while any(len(piece) > _RUN_TOKENS for piece in pieces):
        long = [number for number, piece in enumerate(pieces) if len(piece) > _RUN_TOKENS]
        _hidden(model, state, [pieces[number][:_RUN_TOKENS] for number in long], [slots[number] for number in long])
        pieces = [piece[_RUN_TOKENS:] if len(piece) > _RUN_TOKENS else piece for piece in pieces]
    return _hidden(model, state, pieces, slots)


def _hidden(model: Decoder, state: State, pieces: Sequence[list[int]], slots: Sequence[int]) -> Float[Tensor, "N D"]:
    tokens = torch.tensor([token for piece in pieces for token in piece], dtype=torch.int64, device=state.device)
    stream = state.stream([len(piece) for piece in pieces], slots)
    return model.hidden(tokens, stream.last_rows(), state)
