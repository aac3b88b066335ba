"""Which layers keep softmax: the published sets from the published scores, and the edges of every rule."""

from itertools import pairwise

import pytest

from longwave.conversion.selection import (
    Sweep,
    even,
    halo,
    halo_corrected,
    jet_nemotron,
    kept,
    last,
    rank_correlation,
    ranking,
)
from longwave.errors import UserError

# Percent, from the logs that HALO's authors published with their code (arXiv 2601.22156), rounded to two decimals.
RECALL_2B = (
    "63.39 72.02 69.37 71.44 70.97 74.32 68.62 71.00 72.58 69.35 72.49 68.83 69.36 72.58 71.82 73.14 70.17 70.53 70.87 "
    "68.47 71.88 65.31 72.74 70.64 69.36 67.05 70.08 72.16"
)
SENSE_2B = (
    "31.08 55.48 58.04 58.39 57.56 57.99 57.84 57.53 58.28 58.02 57.22 57.27 57.68 57.82 57.84 57.94 57.91 57.25 57.57 "
    "57.76 57.08 57.68 57.09 57.75 57.76 57.69 57.79 57.94"
)
RECALL_8B = (
    "77.12 80.08 78.79 80.13 80.14 79.68 80.25 77.81 80.60 80.24 80.64 80.55 80.73 79.25 79.79 79.45 80.91 79.89 80.35 "
    "80.84 79.78 80.04 78.43 80.11 77.49 80.35 79.28 80.89 80.46 79.84 80.56 79.89 80.32 77.50 80.10 80.38"
)
SENSE_8B = (
    "55.61 70.99 70.86 70.59 71.01 70.43 71.11 70.94 70.79 70.81 71.16 70.71 70.66 70.62 70.49 70.42 70.81 70.28 70.58 "
    "70.76 70.68 70.34 70.37 70.46 70.90 70.60 70.58 70.83 70.76 70.54 70.84 70.71 70.41 70.84 70.95 70.96"
)
RECALL_4B = (
    "82.15 84.34 84.49 85.38 84.99 84.14 84.64 81.22 84.44 84.82 84.80 84.75 84.75 84.47 83.40 82.59 84.15 84.53 84.19 "
    "84.15 84.17 83.67 82.48 84.34 81.27 84.51 84.75 84.48 84.94 84.64 84.78 84.21 84.45 82.49 83.36 84.53"
)
SENSE_4B = (
    "70.32 70.21 69.79 69.52 69.72 69.77 69.66 69.87 69.26 69.69 69.64 69.69 69.60 69.61 69.62 69.63 69.61 69.45 69.53 "
    "69.50 69.60 69.46 69.46 69.77 69.37 69.54 69.47 69.67 69.74 69.65 69.81 69.87 69.68 69.70 69.79 69.42"
)
PUBLISHED = {
    "2B": (RECALL_2B, SENSE_2B, [2, 3, 6, 8, 9, 21, 25]),
    "8B": (RECALL_8B, SENSE_8B, [1, 2, 4, 6, 7, 10, 24, 33, 34]),
    "4B": (RECALL_4B, SENSE_4B, [0, 1, 7, 14, 15, 22, 24, 33, 34]),  # the folder that was published has 31 for 34
}


def shares(text: str) -> list[float]:
    return [float(value) / 100 for value in text.split()]


@pytest.mark.parametrize("model", PUBLISHED)
def test_halo_keeps_the_published_layers(model: str) -> None:
    recall, sense, expected = PUBLISHED[model]
    scores = halo(Sweep(shares(recall), shares(sense)))
    assert kept(ranking(scores), len(expected)) == expected


def test_the_layer_of_the_best_sense_is_always_kept_by_the_published_rule_alone() -> None:
    """Layer 3 of the 2B has the largest C, and a loss of recall that is nothing special."""
    sweep = Sweep(shares(RECALL_2B), shares(SENSE_2B), teacher_recall=0.745, teacher_sense=0.585)
    assert ranking(halo(sweep))[0] == 3
    assert halo(sweep)[3] == 50
    corrected = halo_corrected(sweep)
    assert ranking(corrected)[0] != 3
    assert max(corrected) < 10 * sorted(corrected)[len(corrected) // 2]
    both_best = Sweep([0.5, 0.9, 0.7], [0.5, 0.6, 0.4])
    assert halo(both_best)[1] == 0  # the largest R and C together: nothing over epsilon


def test_jet_nemotron_ranks_by_the_recall_that_is_lost() -> None:
    sweep = Sweep([0.8, 0.5, 0.9], teacher_recall=0.85)
    assert jet_nemotron(sweep) == pytest.approx([0.05, 0.35, -0.05])
    assert ranking(jet_nemotron(sweep)) == [1, 0, 2]


def test_the_first_and_the_last_layer_can_be_pinned() -> None:
    ranked = [5, *(layer for layer in range(32) if layer != 5)]
    assert kept(ranked, 8, (0, 31)) == [0, 1, 2, 3, 4, 5, 6, 31]
    assert kept(ranked, 2, (31, 0)) == [0, 31]


@pytest.mark.parametrize("layers", range(1, 40))
def test_simple_rules_give_as_many_layers_as_asked_for(layers: int) -> None:
    for count in range(layers + 1):
        assert last(layers, count) == list(range(layers))[layers - count :]
        spread = even(layers, count)
        assert len(set(spread)) == count
        assert all(0 <= layer < layers for layer in spread)
        gaps = [later - earlier for earlier, later in pairwise(spread)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_rankings_are_compared() -> None:
    assert rank_correlation([3, 1, 0, 2], [3, 1, 0, 2]) == pytest.approx(1)
    assert rank_correlation([0, 1, 2, 3], [3, 2, 1, 0]) == pytest.approx(-1)
    assert rank_correlation([0, 1, 2], [0, 2, 1]) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: halo(Sweep([0.5, 0.6])), "needs sense"),
        (lambda: halo_corrected(Sweep([0.5], [0.5])), "and the teacher's"),
        (lambda: jet_nemotron(Sweep([0.5])), "needs the teacher's recall"),
        (lambda: Sweep([0.5, 0.6], [0.5]), "sense: 1 layers; recall has 2"),
        (lambda: Sweep([]), "recall: no layers"),
        (lambda: ranking([0.5, float("nan")]), "not a finite number"),
        (lambda: kept([0, 1, 2], 4), "softmax layers = 4: 0 to 3"),
        (lambda: even(3, 4), "softmax layers = 4: 0 to 3"),
        (lambda: kept([0, 1, 2], 1, (0, 2)), "fewer than the 2 that are pinned"),
        (lambda: kept([0, 1, 2], 1, (7,)), r"pinned = \[7\]: no such layer; there are 0 to 2"),
        (lambda: rank_correlation([0, 1], [0, 2]), "of the same two layers"),
    ],
)
def test_mistakes_get_one_line(mistake, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mistake()
