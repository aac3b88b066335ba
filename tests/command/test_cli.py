"""The command line: every verb does its work, and every mistake is one line that says what would do."""

from __future__ import annotations

import argparse
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from command_line import shell
from runs import STEPS, StopAt, losses, recipe, trained, write_recipe

import longwave as lw
from longwave import files
from longwave.cli import VERBS, command_line, main
from longwave.cli.generate import _unescaped
from longwave.training.loop import Interrupted
from longwave.version import __version__


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished tiny run; nobody changes it."""
    folder = tmp_path_factory.mktemp("run")
    trained(recipe("published"), folder)
    return folder


@pytest.fixture
def model(run_folder: Path) -> Path:
    return run_folder / "model"


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.toml")


# --- light to start ---------------------------------------------------------------------------------------------------


def helped(*words: str) -> str:
    """A program that shows help, or the version."""
    return f"try: main({[*words]!r})\nexcept SystemExit: pass"


def test_nothing_heavy_is_imported_before_a_verb_is_called():
    """For the help of every verb, in one process."""
    calls = [helped("--version"), helped("--help"), *(helped(verb.name, "--help") for verb in VERBS)]
    program = "\n".join(["import sys", "from longwave.cli import main", *calls])
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\nprint({{'torch', 'transformers', 'rich'}} & sys.modules.keys())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[0] == f"longwave {__version__}"
    assert done.stdout.splitlines()[-1] == "set()"


def test_help_names_every_verb():
    shown = shell("--help")
    assert shown.returncode == 0
    assert [verb.name for verb in VERBS if verb.name not in shown.stdout] == []
    assert shell("--version").stdout == f"longwave {__version__}\n"


@pytest.mark.parametrize("verb", [verb.name for verb in VERBS])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert f"usage: longwave {verb}" in capsys.readouterr().out


def test_every_option_has_help():
    def check(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for verb in action.choices.values():
                    check(verb)
            else:
                assert action.help, f"{parser.prog} {action.option_strings or action.dest}"

    check(command_line())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["VERB"]),
        (["trian", "x.toml"], ["trian", "train"]),
        (["train"], ["recipe"]),
        (["train", "x.toml", "--outptu", "y"], ["--outptu"]),
        (["eval", "a", "b", "c=d"], ["c=d"]),
        (["doctor", "--frequency"], ["--frequency"]),
        (["plan", "x.toml", "--dtype", "fp12"], ["fp12", "bf16"]),
        (["generate", "x", "--dtype", "int4"], ["int4", "fp32"]),
        (["generate", "x", "--temperature", "warm"], ["warm", "--temperature"]),
    ],
)
def test_a_wrong_command_line(refuses, arguments: list[str], says: list[str]):
    refuses(*arguments, says=says)


# --- doctor, plan -----------------------------------------------------------------------------------------------------


def test_doctor(longwave):
    plain, found = longwave("doctor"), longwave("doctor", "--json")
    assert (plain.code, found.code) == (0, 0)
    assert found.json["torch"] == torch.__version__
    assert found.json["longwave"] == __version__
    assert "op attention" in found.json
    assert f"torch                 {torch.__version__}" in plain.out


def test_plan_of_a_recipe_and_of_a_folder_with_a_config_alone(longwave, toml: Path, model: Path, tmp_path: Path):
    (tmp_path / "bare").mkdir()
    shutil.copy(model / "config.json", tmp_path / "bare")
    of_recipe = longwave("plan", toml, "--context", "64,1k", "--json")
    of_folder = longwave("plan", tmp_path / "bare", "--context", "64,1k", "--json")
    assert (of_recipe.code, of_folder.code) == (0, 0)
    assert of_recipe.json == of_folder.json
    assert list(of_recipe.json["contexts"]) == ["64", "1024"]
    expected = sum(weight.numel() for weight in trained(recipe(), tmp_path / "run").model.parameters())
    assert of_recipe.json["contexts"]["64"][-1]["parameters"] == expected
    assert f"{expected:,}" in longwave("plan", toml).out


@pytest.mark.parametrize("context", ["0", "000", "many", "64,", "", "1T", "-5", "k", "²", "٣", "1.5k", "1e3"])
def test_plan_refuses_what_is_no_number_of_tokens(refuses, toml: Path, context: str):
    refuses("plan", toml, f"--context={context}", says=["no number of tokens; write 4096,64k,1M"])


@pytest.mark.parametrize(
    ("context", "says"),
    [
        ("4k,4G", "'4G': 4,294,967,296 tokens; places are counted up to 2,147,483,647"),
        ("9" * 5000, "5,000 digits; at most 15"),
        (",".join(["1"] * 101), "101 numbers of tokens; give 1 to 100 of them"),
    ],
)
def test_plan_refuses_more_than_any_model_sees(refuses, toml: Path, context: str, says: str):
    assert len(refuses("plan", toml, "--context", context, says=[says])) < 300


@pytest.mark.parametrize(
    ("layout", "override", "says"),
    [
        ("S", "model.infllm.kernel_size=48", "infllm.kernel_size = 48: twice kernel_stride, 32"),
        ("S", "model.infllm.block_size=72", "infllm.block_size = 72: a multiple of kernel_stride = 16"),
        ("S", "model.infllm.topk=1", "fewer than the 34 forced ones"),
        ("2L", "model.lightning.state_dtype=bfloat16", "'bfloat16': input should be 'float32' or 'float64'"),
        ("2L", "model.lightning.kv_heads=3", "lightning.kv_heads = 3: a divisor of lightning.heads"),
        ("F subllm(0.5: F)", "model.lightning.rotary=false", "lightning has no effect: the layout has no L block"),
    ],
)
def test_training_refuses_hybrids_that_cannot_be(
    refuses, toml: Path, tmp_path: Path, layout: str, override: str, says: str
):
    output = tmp_path / "run"
    refuses("train", toml, f"model.layout={layout}", override, "--output", output, says=[says])
    assert not output.exists()


def test_plan_refuses_what_is_no_model(refuses, tmp_path: Path):
    refuses("plan", tmp_path / "nothing", says=["neither a file nor the name of a recipe"])
    refuses("plan", tmp_path, says=["no config.json"])
    (tmp_path / "half.toml").write_text("[training]\nsteps = 3\n")
    refuses("plan", tmp_path / "half.toml", says=["no [model] table"])


# --- prepare ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    lines = [json.dumps({"text": path.read_text(), "id": 1}) for path in sorted(runs.corpus().rglob("*.py"))]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path / "corpus.jsonl"


def test_prepare_a_folder_a_file_and_jsonl(longwave, jsonl: Path, tmp_path: Path):
    shares = ["--vocab-size", "290", "--held-out", "0.3", "--seed", "1", "--json"]
    sources = {"folder": runs.corpus(), "file": runs.corpus() / "shlex.py", "jsonl": jsonl}
    found = {name: longwave("prepare", source, tmp_path / name, *shares) for name, source in sources.items()}
    assert [result.code for result in found.values()] == [0, 0, 0]
    for name, result in found.items():
        assert result.json == json.loads((tmp_path / name / "meta.json").read_text())
        assert result.json["vocab_size"] == 290
        assert result.json["train"]["tokens"] > 1000
        assert result.json["held_out"]["tokens"] > 500
        assert f"{result.json['train']['tokens']:,} training tokens" in result.out
    count = len(runs.FILES)
    assert found["folder"].json["train"]["documents"] + found["folder"].json["held_out"]["documents"] == count
    assert found["jsonl"].json["train"]["documents"] + found["jsonl"].json["held_out"]["documents"] == count


def test_prepare_with_the_tokenizer_of_a_model(longwave, model: Path, tmp_path: Path):
    result = longwave("prepare", runs.corpus(), tmp_path / "data", "--tokenizer", model, "--held-out", "0.3", "--json")
    assert result.json["tokenizer"] == json.loads((runs.prepared() / "meta.json").read_text())["tokenizer"]


def test_prepare_the_standard_library(longwave, tmp_path: Path, monkeypatch):
    """A part of it: the library's path is pointed at the corpus."""
    monkeypatch.setattr("longwave.data.sources.sysconfig.get_path", lambda name: str(runs.corpus()))
    result = longwave("prepare", "stdlib", tmp_path / "data", "--vocab-size", "280", "--held-out", "0.3", "--json")
    assert result.code == 0
    assert result.json["train"]["documents"] + result.json["held_out"]["documents"] == len(runs.FILES)


def make_empty(folder: Path) -> None:
    (folder / "sub").mkdir(parents=True)
    (folder / "empty.txt").touch()


def make_binary(folder: Path) -> None:
    folder.mkdir()
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0" + bytes(range(256)))


@pytest.mark.parametrize("make", [make_empty, make_binary])
def test_prepare_refuses_a_folder_without_text(refuses, tmp_path: Path, make):
    make(tmp_path / "text")
    refuses("prepare", tmp_path / "text", tmp_path / "data", says=["holds no text"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--vocab-size", "100"], ["vocab_size = 100", "258"]),
        (["--held-out", "1.5"], ["held_out = 1.5"]),
        (["--tokenizer", "nowhere"], ["there is no folder nowhere"]),
        (["--text-field", "body"], ["no string field 'body'"]),
    ],
)
def test_prepare_refuses_settings_that_cannot_work(refuses, jsonl: Path, tmp_path: Path, options, says):
    refuses("prepare", jsonl, tmp_path / "data", *options, says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_prepare_overwrites_nothing(refuses, jsonl: Path, tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.txt").write_text("mine")
    refuses("prepare", jsonl, tmp_path / "data", says=[str(tmp_path / "data")])
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine.txt"]
    refuses("prepare", tmp_path / "missing", tmp_path / "new", says=["no such file or folder"])


# --- train, eval ------------------------------------------------------------------------------------------------------


def test_train_then_eval(longwave, toml: Path, tmp_path: Path):
    result = longwave("train", toml, "--output", tmp_path / "run", "training.log_every=2", "--json")
    assert result.code == 0
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert result.json["step"] == STEPS
    assert result.json["model"] == str(tmp_path / "run" / "model")
    assert [entry["step"] for entry in losses(tmp_path / "run")] == [1, 2, 4, 6, 8]
    assert f"held-out loss {result.json['held_out_loss']:.4f}" in result.out
    again = longwave("train", toml, "training.log_every=2", "--output", tmp_path / "run", "--json")
    assert again.json == result.json
    assert f"resuming after step {STEPS}" in again.err
    judged = longwave("eval", tmp_path / "run" / "model", runs.prepared(), "--json")
    assert judged.code == 0
    assert abs(judged.json["loss"] - result.json["held_out_loss"]) < 0.1
    assert judged.json["tokens"] > 4 * runs.WINDOW
    assert len(judged.json["retention"]) == 2
    assert "bits_per_byte" in judged.out


def test_overrides_win_over_the_recipe_wherever_they_stand(longwave, toml: Path, tmp_path: Path):
    arguments = ["training.steps=3", "--output", tmp_path / "run", "model.hidden_size=16", "--json", "model.mlp.size=8"]
    assert longwave("train", toml, *arguments).code == 0
    saved = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["model"]
    assert (saved["hidden_size"], saved["mlp"]["size"]) == (16, 8)
    assert losses(tmp_path / "run")[-1]["step"] == 3


def test_the_run_is_named_after_its_recipe(longwave, toml: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert longwave("train", toml, "training.steps=3").code == 0
    assert (tmp_path / "runs" / "tiny" / "model").is_dir()


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.hiden_size=32", ["tiny.toml", "unknown key model.hiden_size = 32", "did you mean model.hidden_size?"]),
        ("trainning.steps=3", ["unknown key trainning", "did you mean training?"]),
        ("optimizer.learning_rate=3", ["learning_rate"]),
        ("model.layout=2F subllm(0.64: 2F", ["layout, character 19", "expected ')'"]),
        ("model.layout=2F + 2F", ["layout, character 4", ">>+<<"]),
        ("model.layout=2Q", ["layout, character 2", "no block kind 'Q'"]),
        ("model.layout=F subllm(1.2: F) F", ["retention 1.2 is outside (0, 1]"]),
        ("model.layout=F subllm(0: F) F", ["retention 0 is outside (0, 1]"]),
        ("model.layout=F subllm(most: F) F", ["retention 'most' is not a number"]),
        ("model.layout=3F", ["subllm has no effect"]),
        ("model.attention.heads=3", ["attention.heads = 3", "hidden_size = 32"]),
        ("model.attention.kv_heads=3", ["attention.kv_heads = 3: a divisor of attention.heads = 2"]),
        ("model.vocab_size=100", ["vocab_size = 100", "300"]),
        ("model.hidden_size=wide", ["model.hidden_size = 'wide'", "integer"]),
        ("training.steps=0", ["training.steps = 0: 1 or more"]),
        ("training.micro_windows=3", ["training.micro_windows = 3: a divisor of training.batch_windows = 4"]),
        ("training.window=65", ["training.window = 65: at most model.context_window = 64"]),
        ("training.precision=fp8", ["training.precision = 'fp8'", "fp32"]),
        ("training.device=cuda:99", ["device = 'cuda:99'", "use cpu or auto"]),
        ("training.device=abacus", ["device = 'abacus'", "cuda:N"]),
        ("training.device=meta", ["device = 'meta'", "cuda:N"]),
        ("schedule.warmup_steps=50", ["warmup_steps = 50"]),
        ("data.folder=nowhere", ["nowhere: not a prepared folder", "longwave prepare"]),
        ("steps", ["'steps': an override reads key.path=value"]),
        ("=3", ["'=3': an override reads key.path=value"]),
        ("training.steps.more=3", ["steps is a value, not a table"]),
    ],
)
def test_train_refuses_a_wrong_recipe_and_leaves_nothing_behind(refuses, toml: Path, tmp_path: Path, override, says):
    refuses("train", toml, override, "--output", tmp_path / "run", says=says)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.toml"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_is_refused(refuses, toml: Path, model: Path, tmp_path: Path):
    says = ["device = 'cuda'", "this machine has 0 CUDA devices", "use cpu or auto"]
    refuses("train", toml, "training.device=cuda", "--output", tmp_path / "run", says=says)
    refuses("generate", model, "--prompt", "x", "--device", "cuda", says=says)
    refuses("eval", model, runs.prepared(), "--device", "cuda", says=says)
    assert not (tmp_path / "run").exists()


def test_train_refuses_what_is_no_recipe(refuses, tmp_path: Path):
    refuses("train", tmp_path / "missing.toml", says=["missing.toml: neither a file nor the name of a recipe"])
    refuses("train", tmp_path, says=["directory"])
    (tmp_path / "bad.toml").write_text("[model\nx = 1")
    refuses("train", tmp_path / "bad.toml", says=["bad.toml: not TOML", "line 1"])
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\0")
    refuses("train", tmp_path / "bytes.toml", says=["bytes.toml: not TOML"])
    (tmp_path / "empty.toml").write_text("")
    refuses("train", tmp_path / "empty.toml", says=["is missing"])


def test_train_refuses_the_folder_of_another_run(refuses, toml: Path, tmp_path: Path):
    with pytest.raises(Interrupted):
        trained(recipe("published"), tmp_path / "run", StopAt(2))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    says = ["a checkpoint of another run", "model.norm_eps = 1e-05 there, 0.001 here", "give another output folder"]
    refuses("train", toml, "model.norm_eps=1e-3", "--output", tmp_path / "run", says=says)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


def test_train_refuses_an_output_that_is_a_file(refuses, toml: Path, tmp_path: Path):
    (tmp_path / "run").write_text("mine")
    refuses("train", toml, "--output", tmp_path / "run", says=["run"], code=1)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_full_disk_while_saving_leaves_the_earlier_checkpoint(toml: Path, tmp_path: Path):
    with pytest.raises(Interrupted):
        trained(recipe("published"), tmp_path / "run", StopAt(2))

    def little_room() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    size = (tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors").stat().st_size
    assert size > 50_000
    failed = shell("train", toml, "--output", tmp_path / "run", preexec_fn=little_room)
    line = failed.stderr.splitlines()[-1]
    assert failed.returncode == 1, failed.stderr
    assert line.startswith("longwave: saving ")
    assert "File too large" in line
    assert "nothing was changed" in line
    assert "Traceback" not in failed.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-00000002"]
    assert files.verify(tmp_path / "run" / "checkpoints" / "step-00000002")
    assert not (tmp_path / "run" / "model").exists()
    assert shell("train", toml, "--output", tmp_path / "run").returncode == 0
    trained(recipe("published"), tmp_path / "straight")
    assert [entry["step"] for entry in losses(tmp_path / "run")] == list(range(1, STEPS + 1))


def test_eval_refuses_data_of_another_tokenizer_and_windows_without_sense(refuses, longwave, model, tmp_path: Path):
    longwave("prepare", runs.corpus(), tmp_path / "data", "--vocab-size", "280", "--held-out", "0.3")
    refuses("eval", model, tmp_path / "data", says=["tokenizer = ", "the data was written with"])
    refuses("eval", model, runs.prepared(), "--window", "0", says=["window = 0"])
    refuses("eval", model, tmp_path, says=["not a prepared folder"])
    refuses("eval", tmp_path / "missing", runs.prepared(), says=["missing", "give a model folder"])


def test_eval_prints_as_many_digits_as_say_something(longwave, model: Path):
    shown = longwave("eval", model, runs.prepared()).out
    assert max(len(number.replace(".", "")) for number in re.findall(r"[\d.]+", shown)) <= 6, shown


def broken(model: Path, tmp_path: Path, change: Callable[[torch.Tensor], object]) -> Path:
    """A copy of a model with changed weights of its head."""
    broken = lw.load(model)
    with torch.no_grad():
        change(broken.head_weight)
    lw.save(broken, tmp_path / "broken")
    return tmp_path / "broken"


def test_a_perplexity_without_a_number_is_infinite_and_null(longwave, model: Path, tmp_path: Path):
    found = longwave("eval", broken(model, tmp_path, lambda weight: weight.mul_(1e5)), runs.prepared(), "--json")
    assert found.code == 0
    assert found.json["loss"] > 709
    assert found.json["perplexity"] is None
    assert "perplexity       inf" in found.out


def test_what_a_diverged_model_says_is_refused(refuses, model: Path, tmp_path: Path):
    diverged = broken(model, tmp_path, lambda weight: weight[0].fill_(float("nan")))
    refuses("eval", diverged, runs.prepared(), says=["held-out loss = nan", "diverged"], code=1)
    words = ["generate", diverged, "--prompt", "x"]
    refuses(*words, says=["logit for token 3 of prompt 1 = nan", "diverged"], code=1)
    refuses(*words, "--temperature", "1", says=["logit for token 3 of prompt 1 = nan"], code=1)


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_streams_one_prompt(longwave, model: Path):
    plain = longwave("generate", model, "--prompt", "def f(", "--max-new-tokens", "12")
    found = longwave("generate", model, "--prompt", "def f(", "--max-new-tokens", "12", "--json")
    assert (plain.code, found.code) == (0, 0)
    assert found.json == {"prompts": ["def f("], "texts": [plain.out[:-1]], "ended": ["max_new_tokens"]}
    assert plain.out[:-1]
    assert "attention" in plain.err


def stdin(content: bytes) -> io.TextIOWrapper:
    """A standard input that holds these bytes."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")


def test_generate_from_files_stdin_and_several_prompts(longwave, model: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("class A:")
    several = ["--prompt", "def f(", "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", "9"]
    found = longwave("generate", model, *several, "--json")
    assert found.json["prompts"] == ["def f(", "class A:"]
    shown = longwave("generate", model, *several).out
    assert shown == "".join(f"--- {i + 1}\n{text}\n" for i, text in enumerate(found.json["texts"]))
    monkeypatch.setattr(sys, "stdin", stdin(b"class A:"))
    alone = longwave("generate", model, "--max-new-tokens", "9", "--json").json
    assert (alone["prompts"], alone["texts"]) == (["class A:"], [found.json["texts"][1]])


def test_generate_through_a_pipe(model: Path):
    """A real process with real stdin, twice, with the same seed."""
    words = ["generate", model, "--temperature", "0.9", "--top-p", "0.95", "--seed", "4", "--max-new-tokens", "9"]
    first, second = (shell(*words, "--json", input="import ") for _ in range(2))
    assert (first.returncode, first.stdout) == (0, second.stdout)
    assert json.loads(first.stdout.splitlines()[-1])["prompts"] == ["import "]


def test_generate_obeys_its_options(longwave, model: Path):
    words = ["generate", model, "--prompt", "def f(", "--temperature", "1.5", "--max-new-tokens", "20", "--json"]
    text = longwave(*words).json["texts"][0]
    assert longwave(*words, "--seed", "1").json["texts"][0] != text
    assert longwave(*words, "--stop", text[4:7]).json["texts"][0] == text[: text.find(text[4:7])]
    greedy = longwave(*words[:4], "--max-new-tokens", "20", "--json").json["texts"][0]
    assert longwave(*words, "--top-k", "1").json["texts"][0] == greedy
    assert "bfloat16" in longwave(*words, "--dtype", "bf16").err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompt", "word " * 300], ["prompt 1 has", "context_window is 64"]),
        (["--prompt", "x", "--max-new-tokens", "0"], ["max_new_tokens = 0"]),
        (["--prompt", "x", "--top-k", "5"], ["no effect at temperature = 0"]),
        (["--prompt", "x", "--seed", "5"], ["seed = 5 has no effect"]),
        (["--prompt", "x", "--temperature", "-1"], ["temperature = -1.0"]),
        (["--prompt", "x", "--temperature", "inf"], ["temperature = inf"]),
        (["--prompt", "x", "--temperature", "1", "--top-p", "0"], ["top_p = 0.0"]),
        (["--prompt", "x", "--stop", ""], ["a stop string is empty"]),
        (["--prompt", "x", "--device", "abacus"], ["device = 'abacus'"]),
        (["--prompt-file", "/nowhere/prompt.txt"], ["--prompt-file /nowhere/prompt.txt", "no such file"]),
        (["--prompt", "\udcff"], ["not valid Unicode"]),
    ],
)
def test_generate_refuses(refuses, model: Path, options: list[str], says: list[str]):
    refuses("generate", model, *options, says=says)


def test_generate_refuses_input_that_is_no_text(refuses, model: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "prompt.bin").write_bytes(b"\xff\xfe")
    refuses("generate", model, "--prompt-file", tmp_path / "prompt.bin", says=["not UTF-8"])
    monkeypatch.setattr(sys, "stdin", stdin(b"\xff\xfe"))
    refuses("generate", model, says=["stdin: not UTF-8"])
    monkeypatch.setattr(sys, "stdin", stdin(b""))
    refuses("generate", model, says=["no prompt: give --prompt"])


def test_a_byte_order_mark_is_no_text(longwave, model: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfdef f(\r\n")
    from_file = longwave("generate", model, "--prompt-file", tmp_path / "bom.txt", "--max-new-tokens", "3", "--json")
    assert from_file.json["prompts"] == ["def f(\r\n"]
    monkeypatch.setattr(sys, "stdin", stdin(b"\xef\xbb\xbfdef f("))
    assert longwave("generate", model, "--max-new-tokens", "3", "--json").json["prompts"] == ["def f("]


def test_generate_says_that_the_context_window_ends_a_text(longwave, model: Path):
    words = ["--prompt", "def f(", "--prompt", "x", "--stop", "\x00", "--json"]
    found = longwave("generate", model, *words, "--max-new-tokens", "500")
    assert found.json["ended"] == ["context_window"] * 2
    told = [line for line in found.err.splitlines() if "context window" in line]
    assert told == [
        f"prompt {n}: ended at the context window of 64 tokens, before --max-new-tokens 500" for n in (1, 2)
    ]
    assert "context window" not in longwave("generate", model, *words, "--max-new-tokens", "5").err


@pytest.mark.parametrize(("given", "stop"), [(r"\n", "\n"), (r"\t", "\t"), (r"\\n", r"\n"), (r"\d", r"\d"), ("n", "n")])
def test_escapes_of_stop_strings(given: str, stop: str):
    assert _unescaped(given) == stop


def test_generate_refuses_a_terminal_without_a_prompt(refuses, model: Path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    refuses("generate", model, says=["no prompt: give --prompt"])


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", files.MANIFEST])
def test_a_damaged_model_is_refused(refuses, model: Path, tmp_path: Path, name: str):
    shutil.copytree(model, tmp_path / "model")
    raw = bytearray((tmp_path / "model" / name).read_bytes())
    raw[len(raw) // 2] ^= 4
    (tmp_path / "model" / name).write_bytes(raw)
    refuses("generate", tmp_path / "model", "--prompt", "x", says=[name])
    (tmp_path / "model" / name).write_bytes(raw[: len(raw) // 2])
    refuses("generate", tmp_path / "model", "--prompt", "x", says=[name])
    refuses("eval", tmp_path / "model", runs.prepared(), says=[name])


def test_a_missing_folder_or_file_of_a_model_is_refused(refuses, model: Path, tmp_path: Path):
    refuses("generate", tmp_path / "missing", "--prompt", "x", says=["missing", "give a model folder"])
    shutil.copytree(model, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    refuses("generate", tmp_path / "model", "--prompt", "x", says=["model.safetensors is missing"])
