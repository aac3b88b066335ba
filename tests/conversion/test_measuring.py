"""Figures by which layers are selected: what they should be by another way, each measured once whatever happens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import pytest
import runs
import torch

from longwave.config import ModelConfig, build
from longwave.conversion.figures import Figure, fingerprint
from longwave.conversion.measures import Divergence, NextTokenAccuracy, TaskAccuracy
from longwave.conversion.measuring import Greedy, Measuring
from longwave.conversion.rankings import rankings
from longwave.conversion.selection import Sweep, importance_correlation
from longwave.conversion.swapping import swapped
from longwave.conversion.transfer import assembled, transferred
from longwave.data.packed import NO_TARGET, PackedTokens
from longwave.data.recall import Sample
from longwave.data.tokenizer import Tokenizer
from longwave.errors import MachineError, UserError
from longwave.evaluation import likelihood
from longwave.evaluation import recall as recall_module
from longwave.evaluation.harness import HarnessScore
from longwave.evaluation.suite import Asked, suite_of
from longwave.model import Decoder
from longwave.streams import Stream

LAYERS, WINDOWS = 4, 3
LOUDNESS = (1.0, 0.0, 4.0, 2.0)  # how much each layer says; the second nothing, neither before nor after


def config(layout: str) -> ModelConfig:
    shape = {"vocab_size": runs.VOCABULARY, "hidden_size": 32, "layout": layout, "context_window": 512}
    tables = {"attention": {"heads": 2, "kv_heads": 1}, "mlp": {"size": 48}, "init": {"std": 0.2}}
    return build(ModelConfig, {**shape, **tables}, "model")


@cache
def models() -> tuple[Decoder, Decoder]:
    """A teacher whose layers say more or less, and linear layers of which none says anything."""
    teacher = Decoder(config(f"{LAYERS}F"), seed=7)
    teacher.tokenizer = Tokenizer.load(runs.prepared())
    with torch.no_grad():
        for block, loudness in zip(teacher.blocks, LOUDNESS, strict=True):
            block.mixer.o_proj.weight.mul_(loudness)
        _teach_head(teacher)
        aligned = transferred(teacher, config(f"{LAYERS}L"))
        for block in aligned.blocks:
            block.mixer.o_proj.weight.zero_()
    return teacher, aligned


def _teach_head(model: Decoder) -> None:
    """Gives the head the least squares of next tokens, by which a model that was never trained is right at times."""
    batch = PackedTokens(runs.prepared(), "train", 64).batch(range(32))
    hidden = model.hidden(batch.tokens, Stream.of(batch.runs))[batch.targets != NO_TARGET]
    wanted = torch.nn.functional.one_hot(batch.targets[batch.targets != NO_TARGET], runs.VOCABULARY).float()
    model.head_weight.copy_(20 * torch.linalg.lstsq(hidden, wanted).solution.T)


def text(window: int = 64) -> PackedTokens:
    return PackedTokens(runs.prepared(), "held_out", window, keep_last=True)


@cache
def by_hand(linear: frozenset[int]) -> tuple[float, float]:
    """Accuracy and divergence of a model that was assembled, by all logits of a window at once, in fp64."""
    teacher, aligned = models()
    layout = " ".join("L" if depth in linear else "F" for depth in range(LAYERS))
    student = assembled(teacher, aligned, config(layout)).double()
    source = transferred(teacher, teacher.config).double()
    right, apart, targets, rows = 0, 0.0, 0, 0
    for number in range(WINDOWS):
        batch = text().batch([number])
        with torch.no_grad():
            theirs, ours = (one(batch.tokens, Stream.of(batch.runs)).log_softmax(-1) for one in (source, student))
        asked = batch.targets != NO_TARGET
        right += int((ours.argmax(-1) == batch.targets)[asked].sum())
        apart += float((theirs.exp() * (theirs - ours)).sum())
        targets, rows = targets + int(asked.sum()), rows + len(ours)
    return right / targets, apart / rows


class Counted:
    """A measure that knows the answer, and counts how often it is asked."""

    def __init__(self, answer: Callable[[frozenset[int]], float], **settings: Any) -> None:
        self._answer, self._settings = answer, settings
        self.asked = list[frozenset[int]]()

    @property
    def settings(self) -> Mapping[str, Any]:
        return self._settings

    def __call__(self, model: Decoder) -> float:
        kinds = enumerate(type(block.mixer).__name__ for block in model.blocks)
        linear = frozenset(depth for depth, kind in kinds if kind == "LightningAttention")
        self.asked.append(linear)
        return self._answer(linear)


def subsets() -> list[frozenset[int]]:
    several = chain.from_iterable(combinations(range(LAYERS), count) for count in range(LAYERS + 1))
    return [frozenset(one) for one in several]


# The measures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [7, 1 << 12])
def test_accuracy_and_divergence_are_those_of_another_computation(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_CHUNK_ELEMENTS", chunk * runs.VOCABULARY)
    monkeypatch.setattr("longwave.conversion.distil._CHUNK_ELEMENTS", chunk * runs.VOCABULARY)
    teacher, aligned = models()
    right, apart = NextTokenAccuracy([text()], WINDOWS), Divergence(teacher, [text()], WINDOWS)
    for linear in ([], [0], [2, 3], [0, 1, 2, 3]):
        accuracy, divergence = by_hand(frozenset(linear))
        model = swapped(teacher, aligned, linear)
        assert right(model) == accuracy
        assert apart(model) == pytest.approx(divergence, rel=1e-4, abs=1e-7)
        assert accuracy > 0.02
    assert len({by_hand(frozenset(linear))[0] for linear in ([], [0], [2, 3])}) > 1


def test_several_texts_count_alike() -> None:
    teacher, aligned = models()
    model, texts = swapped(teacher, aligned, [0]), [text(), text(24)]
    for kind in (NextTokenAccuracy, lambda *given: Divergence(teacher, *given)):
        alone = [kind([one], 2)(model) for one in texts]
        assert kind(texts, 2)(model) == pytest.approx(sum(alone) / 2)
        assert alone[0] != alone[1]


def softmax_layers(model: Decoder) -> int:
    return sum(type(block.mixer).__name__ == "FullAttention" for block in model.blocks)


def test_recall_is_the_mean_over_tasks_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models say a tenth right for each softmax layer, one more where codes are asked for, two more at 320 tokens."""

    def said(model: Decoder, samples: Sequence[Sample]) -> list[str]:
        rights = [softmax_layers(model) + ("code" in one.prompt) + 2 * (one.length == 320) for one in samples]
        pairs = enumerate(zip(samples, rights, strict=True))
        return [one.answers[0] if number % 10 < right else "?" for number, (one, right) in pairs]

    monkeypatch.setattr(recall_module, "said", said)
    measure = TaskAccuracy(["single", "key-value"], Asked(lengths="300,320", samples=20, seed=3))
    assert measure(swapped(*models(), [])) == pytest.approx(0.55)
    assert measure(swapped(*models(), [0, 2])) == pytest.approx(0.35)
    assert measure.settings["samples"] == 20
    assert TaskAccuracy(["single"]).settings["samples"] == 200


def test_few_shot_tasks_are_those_of_a_model_that_was_assembled() -> None:
    teacher, aligned = models()
    found = TaskAccuracy(["synthetic"], Asked(shots=2, limit=32))(swapped(teacher, aligned, [1, 2]))
    whole = assembled(teacher, aligned, config("F 2L F"))
    assert 0 < found == suite_of(["synthetic"], Asked(shots=2, limit=32)).few_shot(whole)[0].accuracy


@pytest.mark.parametrize(
    ("metrics", "accuracy"),
    [
        ({"acc,none": 0.4, "acc_norm,none": 0.5, "other,none": 0.9}, 0.5),
        ({"perplexity,none": 7.0, "acc,none": 0.4}, 0.4),
        ({"exact_match,strict": 0.3, "exact_match,flexible": 0.6}, 0.3),
        ({"perplexity,none": 7.0}, None),
    ],
)
def test_one_figure_of_lm_eval_counts(
    metrics: dict[str, float], accuracy: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = [HarnessScore("arc_easy", name, value, 10, None) for name, value in metrics.items()]
    subtasks = HarnessScore("arc_easy_part", "acc_norm,none", 0.0, 10, None)
    monkeypatch.setattr("longwave.evaluation.suite.harness_scores", lambda *_: (subtasks, *scores))
    measure = TaskAccuracy(["lm-eval:arc_easy"])
    if accuracy is not None:
        assert measure(models()[0]) == accuracy
    else:
        with pytest.raises(UserError, match="lm-eval:arc_easy: has no acc_norm, acc or exact_match"):
            measure(models()[0])


def test_settings_follow_the_text_and_the_files_of_tasks(tmp_path: Path) -> None:
    assert NextTokenAccuracy([text()], 2).settings == NextTokenAccuracy([text()], 2).settings
    several = [NextTokenAccuracy([text(size)], many).settings for size, many in ((64, 2), (64, 3), (32, 2))]
    several.append(NextTokenAccuracy([text(), text()], 2).settings)
    assert len({json.dumps(one) for one in several}) == 4
    rows = tmp_path / "rows.jsonl"
    found = list[Any]()
    for label in ("no", "maybe"):
        rows.write_text(
            "".join(json.dumps({"text": f"{n}", "label": label if n % 2 else "yes"}) + "\n" for n in range(9))
        )
        found.append(TaskAccuracy([rows]).settings)
    assert found[0] != found[1]


# The sweep, and layers restored one by one ----------------------------------------------------------------------------


def test_a_sweep_replaces_every_layer_alone(tmp_path: Path) -> None:
    recall = Counted(lambda linear: 0.9 - 0.1 * sum(linear))
    found = Measuring(*models(), tmp_path, recall=recall, sense=NextTokenAccuracy([text()], WINDOWS)).sweep()
    assert recall.asked == [frozenset(), *(frozenset([layer]) for layer in range(LAYERS))]
    assert found.recall == pytest.approx([0.9, 0.8, 0.7, 0.6])
    assert found.sense == tuple(by_hand(frozenset([layer]))[0] for layer in range(LAYERS))
    assert (found.teacher_recall, found.teacher_sense) == (0.9, by_hand(frozenset())[0])
    alone = Measuring(*models(), tmp_path, recall=recall).sweep()
    assert (alone.recall, alone.sense, alone.teacher_sense) == (found.recall, (), None)


@pytest.mark.parametrize("count", [None, 1, 2, 3, 4])
def test_greedy_is_brute_force(tmp_path: Path, count: int | None) -> None:
    """Over the divergences of all 16 models, each by another way. The layer that says nothing is restored last."""
    every = {linear: by_hand(linear)[1] for linear in subsets()}
    found = Measuring(*models(), tmp_path, divergence=Divergence(models()[0], [text()], WINDOWS)).greedy(count)
    rounds = LAYERS - 1 if count in (None, LAYERS) else count
    left, chosen = frozenset(range(LAYERS)), list[int]()
    for _ in range(rounds):
        before = left
        best = min(left, key=lambda layer: every[before - {layer}])
        chosen.append(best)
        left = left - {best}
    rest = sorted(left, key=lambda layer: every[before - {layer}])
    assert found.rounds == rounds
    assert found.ranking == (*chosen, *rest)
    assert found.ranking[-1] == LOUDNESS.index(0)
    passed = [frozenset(range(LAYERS)) - set(chosen[:number]) for number in range(rounds + 1)]
    assert found.divergences == pytest.approx([every[one] for one in passed], rel=1e-4, abs=1e-7)


def test_rounds_follow_what_was_restored_before(tmp_path: Path) -> None:
    """Layers 1 and 3 are worth nothing alone and most together, which one round does not see."""
    worth = {frozenset(): 0.0, frozenset([0]): 3.0, frozenset([2]): 2.0}
    lost = lambda linear: 9.0 - worth.get(kept := frozenset(range(LAYERS)) - linear, len(kept) + 6 * ({0, 3} <= kept))  # noqa: E731
    measure = Counted(lost)
    found = Measuring(*models(), tmp_path, divergence=measure).greedy()
    assert found.ranking[:2] == (0, 3)
    assert len(measure.asked) == len(set(measure.asked)) == 1 + 4 + 3 + 2
    once = Measuring(*models(), tmp_path, divergence=measure).greedy(1)
    assert once.ranking == (0, 2, 1, 3)
    assert len(measure.asked) == 1 + 4 + 3 + 2


# Figures that are kept ------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What stops a process."""


@pytest.mark.parametrize("stopped", [1, 10, 17])
def test_what_was_stopped_goes_on_and_measures_nothing_twice(tmp_path: Path, stopped: int) -> None:
    asked = list[tuple[str, frozenset[int]]]()

    def measuring(folder: str, last: int | None = None) -> Measuring:
        def measure(name: str) -> Counted:
            def answer(linear: frozenset[int]) -> float:
                if last is not None and len(asked) == last:
                    raise Killed
                asked.append((name, linear))
                return 0.1 + hash(linear) % 1000 / 3000

            return Counted(answer, of=name)

        named = {name: measure(name) for name in ("recall", "sense", "divergence")}
        return Measuring(*models(), tmp_path / folder, **named)

    straight = measuring("straight")
    whole = (straight.sweep(), straight.greedy())
    assert len(asked) == 20
    asked.clear()
    broken = measuring("broken", stopped)
    with pytest.raises(Killed):
        _ = (broken.sweep(), broken.greedy())
    assert len(json.loads((tmp_path / "broken" / "measured.json").read_text())["figures"]) == stopped
    resumed = measuring("broken")
    assert (resumed.sweep(), resumed.greedy()) == whole
    assert len(asked) == len(set(asked)) == 20
    assert contents(tmp_path / "broken") == contents(tmp_path / "straight")


def contents(folder: Path) -> Any:
    """The file of a folder without the times."""
    found = json.loads((folder / "measured.json").read_text())
    for figure in found["figures"]:
        assert figure.pop("seconds") >= 0
    return found


def test_every_measured_figure_is_told_of_once(tmp_path: Path) -> None:
    told = list[Figure]()
    recall = Counted(lambda linear: len(linear) / 8)
    for _ in range(2):
        measuring = Measuring(*models(), tmp_path, recall=recall, watcher=told.append)
        measuring.sweep()
    assert tuple(told) == measuring.figures
    assert [figure.linear for figure in told] == [(), (0,), (1,), (2,), (3,)]


def test_a_measure_can_be_added_later(tmp_path: Path) -> None:
    recall, sense = Counted(lambda linear: 0.5), Counted(lambda linear: 0.25)
    Measuring(*models(), tmp_path, recall=recall).sweep()
    found = Measuring(*models(), tmp_path, recall=recall, sense=sense).sweep()
    assert (list(found.recall), list(found.sense), len(recall.asked)) == ([0.5] * 4, [0.25] * 4, 5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"recall": Counted(lambda _: 0.5, samples=100)},
            "recall.samples = 200, and 100 is asked for; give",
        ),
        ({"recall": Counted(lambda _: 0.5, samples=200, seed=1)}, "recall.seed = None, and 1 is asked for"),
        ({"recall": Counted(lambda _: 0.5)}, "recall.samples = 200, and None is asked for"),
        ({"teacher": 1}, "measured with another teacher model; give another folder, or remove the file"),
        ({"aligned": 1}, "measured with another aligned model"),
    ],
)
def test_figures_of_other_settings_or_models_are_refused(tmp_path: Path, other: dict[str, Any], message: str) -> None:
    teacher, aligned = models()
    recall = Counted(lambda _: 0.5, samples=200)
    Measuring(teacher, aligned, tmp_path, recall=recall).sweep()
    before = (tmp_path / "measured.json").read_bytes()
    if "teacher" in other:
        teacher = transferred(teacher, teacher.config)
        teacher.blocks[0].mlp.up_proj.weight.data[0, 0] += 1e-3
    if "aligned" in other:
        aligned = transferred(aligned, aligned.config)
        aligned.blocks[3].mixer.q_proj.weight.data[0, 0] += 1e-3
    with pytest.raises(UserError, match=message):
        Measuring(teacher, aligned, tmp_path, recall=other.get("recall", recall))
    assert (tmp_path / "measured.json").read_bytes() == before


def test_only_what_is_swapped_in_belongs_to_the_aligned_model(tmp_path: Path) -> None:
    """Whatever else it has is the teacher's, such as a folder's copy in another dtype."""
    teacher, aligned = models()
    recall = Counted(lambda _: 0.5)
    Measuring(teacher, aligned, tmp_path, recall=recall).sweep()
    other = transferred(aligned, aligned.config)
    other.embed.weight.data.add_(1)
    Measuring(teacher, other, tmp_path, recall=recall).sweep()
    assert len(recall.asked) == 5
    assert fingerprint(other) != fingerprint(aligned)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "measured with another teacher model"),
        (b'{"models": 3}', "models"),
        (b'{"figures": [{"measure": "recall"}]}', "figures"),
        (b'{"figures": [{"measure": "recall", "linear": [0], "value": 1e999, "seconds": 1}]}', "a finite number"),
        (b'{"rounds": 3}', "rounds"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "measured.json").write_bytes(content)
    with pytest.raises(UserError, match=f"measured.json: .*{message}") as caught:
        Measuring(*models(), tmp_path, recall=Counted(lambda _: 0.5))
    assert "\n" not in str(caught.value)


def test_what_a_model_cannot_answer_is_an_error_that_names_it(tmp_path: Path) -> None:
    nothing = Counted(lambda linear: float("nan") if 2 in linear else 0.5)
    with pytest.raises(MachineError, match="recall with layers 2 replaced = nan"):
        Measuring(*models(), tmp_path, recall=nothing).sweep()
    teacher, aligned = models()
    broken = transferred(aligned, aligned.config)
    broken.blocks[1].mixer.o_proj.weight.data[0, 0] = float("inf")
    for kind in (NextTokenAccuracy([text()], 1), Divergence(teacher, [text()], 1)):
        with pytest.raises(MachineError, match=r"recall with layers 1 replaced.*(nan|inf)"):
            Measuring(teacher, broken, tmp_path / type(kind).__name__, recall=kind).sweep()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda one: one.sweep(), "recall: no measure; a sweep measures it"),
        (lambda one: Measuring(*models(), one.folder).greedy(), "divergence: no measure; layers are restored by it"),
        (lambda one: one.greedy(0), "count = 0: 1 to 4, as many as layers were aligned"),
        (lambda one: one.greedy(5), "count = 5: 1 to 4"),
        (lambda _: TaskAccuracy([]), "tasks: none"),
        (lambda _: TaskAccuracy(["sinle"]), "sinle: no such file"),
        (lambda _: TaskAccuracy(["lm-eval:arc_easy"], Asked(samples=3)), "samples = 3: has no effect"),
        (lambda _: NextTokenAccuracy([]), "texts: none"),
        (lambda _: NextTokenAccuracy([text()], -1), "windows = -1: 1 or more"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, mistake: Callable[[Any], Any], message: str) -> None:
    measuring = Measuring(*models(), tmp_path, divergence=Counted(lambda _: 0.5))
    measuring.folder = tmp_path / "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(UserError, match=message):
        mistake(measuring)


# Rules side by side ---------------------------------------------------------------------------------------------------


def test_layers_that_are_alike_share_their_place() -> None:
    assert importance_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1)
    assert importance_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert importance_correlation([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    for one, other, message in (([1, 1], [1, 2], "all layers are alike"), ([1, 2], [1, 2, 3], "2 layers and of 3")):
        with pytest.raises(UserError, match=message):
            importance_correlation(one, other)


def test_rules_are_ranked_by_the_numbers_of_their_layers() -> None:
    sweep = Sweep([0.2, 0.8, 0.5], [0.6, 0.5, 0.59], 0.9, 0.6)
    found = rankings([1, 4, 6], sweep, Greedy((4, 1, 6), 2, (3.0, 2.0, 1.0)))
    assert found.rankings == {
        "halo": (1, 6, 4),
        "halo_corrected": (1, 6, 4),
        "jet_nemotron": (1, 6, 4),
        "sense": (4, 6, 1),
        "kl": (4, 1, 6),
        "last": (6, 4, 1),
    }
    assert found.importances["jet_nemotron"] == pytest.approx((0.7, 0.1, 0.4))
    assert found.correlations["jet_nemotron"]["sense"] == pytest.approx(-1)
    assert found.correlations["kl"] == pytest.approx(
        {"halo": -0.5, "halo_corrected": -0.5, "jet_nemotron": -0.5, "sense": 0.5, "last": -0.5}
    )
    assert not found.left_out
    assert json.loads(json.dumps(asdict(found)))["rankings"]["kl"] == [4, 1, 6]


def test_rules_that_tell_no_layer_from_another_are_left_out() -> None:
    flat = rankings([0, 1, 2], Sweep([0.0] * 3, [0.3, 0.2, 0.1], 0.0, 0.3))
    assert set(flat.rankings) == {"sense", "last"}
    assert set(flat.left_out) == {"halo", "halo_corrected", "jet_nemotron"}
    assert "recall = 0.000, whichever layer is replaced" in flat.left_out["halo"]
    without = rankings([0, 1, 2], Sweep([0.3, 0.2, 0.1], (), 0.3))
    assert set(without.rankings) == {"jet_nemotron", "last"}
    assert "needs sense" in without.left_out["halo"]
    assert set(rankings([0, 1]).rankings) == {"last"}
    assert rankings([3]).left_out == {"last": "all layers are alike by it"}
