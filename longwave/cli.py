"""The command line: verbs, no logic of its own. Heavy imports wait until their verb is called."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from longwave.errors import MachineError, UserError
from longwave.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb; 0, or 2 for the user's mistake, 1 for the machine's fault, 130 when interrupted."""
    try:
        options = parsed(arguments)
        result = options.verb(options)
        if getattr(options, "json", False) and result is not None:
            print(json.dumps(result))
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(error, 2)
    except MachineError as error:
        return _fail(error, 1)
    except KeyboardInterrupt as error:
        return _fail(error if error.args else "interrupted", 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # whoever read our output has gone
        return 1
    except OSError as error:
        return _fail(f"{error.filename or 'the system'}: {error.strerror or error}", 1)


def _fail(problem: object, code: int) -> int:
    print(f"longwave: {' '.join(str(problem).split())}", file=sys.stderr)
    return code


_DEVICES = "auto, cpu, cuda or cuda:N (auto: a GPU where there is one)"


class _Parser(argparse.ArgumentParser):
    """A wrong command line is one line and exit code 2."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of a command line; overrides may also follow options, which argparse alone does not take."""
    parser = command_line()
    options, rest = parser.parse_known_args(arguments)
    if any(one.startswith("-") for one in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


def command_line() -> argparse.ArgumentParser:
    """The parser of every verb."""
    parser = _Parser(prog="longwave", description="Language models whose cost does not explode with context length.")
    parser.add_argument("--version", action="version", version=f"longwave {__version__}")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    _quickstart(verbs)
    _doctor(verbs)
    _prepare(verbs)
    _train(verbs)
    _eval(verbs)
    _generate(verbs)
    _plan(verbs)
    _inspect(verbs)
    _bench(verbs)
    return parser


def _verb(verbs: Any, name: str, run: Any, help: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(name, help=help, description=help)
    parser.set_defaults(verb=run)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    return parser


def _quickstart(verbs: Any) -> None:
    parser = _verb(verbs, "quickstart", _run_quickstart, "train a Llama and a SUBLLM on real text and compare them")
    parser.add_argument("text", nargs="?", help="a text file or folder; the Python standard library by default")
    parser.add_argument("--output", default="quickstart", help="folder of models, metrics.jsonl and report.html")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="recipe values for both, training.steps=50")


def _run_quickstart(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.quickstart import quickstart

    given = [*([] if options.text is None else [options.text]), *options.overrides]
    texts = [one for one in given if "=" not in one or Path(one).exists()]
    if len(texts) > 1:
        raise UserError(f"{texts[1]!r}: one text has been given ({texts[0]}); an override reads key.path=value")
    text = texts[0] if texts else None
    return quickstart(text, Path(options.output), [one for one in given if one != text])


def _doctor(verbs: Any) -> None:
    _verb(verbs, "doctor", _run_doctor, "tell what this machine has and which form each op will run, and why")


def _run_doctor(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.doctor import facts

    found = facts()
    width = max(map(len, found))
    for label, value in found.items():
        print(f"{label:<{width}}  {value}")
    return found


def _prepare(verbs: Any) -> None:
    parser = _verb(verbs, "prepare", _run_prepare, "turn text or conversations into tokenised shards")
    parser.add_argument(
        "source",
        help="a text file, a .jsonl file of texts or chats, a folder of them; 'stdlib' for Python's own sources",
    )
    parser.add_argument("output", help="a new folder")
    parser.add_argument("--vocab-size", type=int, help="entries of the tokenizer to train (8192)")
    parser.add_argument("--tokenizer", help="a folder with tokenizer.json to use instead of training one")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of documents kept from training (0.02)")
    parser.add_argument("--text-field", help="field of the text in JSONL rows, whatever else they hold (text)")
    parser.add_argument("--loss-on", choices=("assistant", "all"), help="what is learned of conversations (assistant)")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of what is held out (0)")


def _run_prepare(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.data.shards import prepare
    from longwave.data.sources import documents, standard_library
    from longwave.data.tokenizer import Tokenizer

    source = standard_library if options.source == "stdlib" else lambda: documents(options.source, options.text_field)
    tokenizer = Tokenizer.load(options.tokenizer) if options.tokenizer else None
    shares = {"held_out": options.held_out, "seed": options.seed, "loss_on": options.loss_on}
    info = prepare(source, options.output, tokenizer=tokenizer, vocab_size=options.vocab_size, **shares)
    print(f"{options.output}: {info.train.tokens:,} training tokens and {info.held_out.tokens:,} held out, ", end="")
    print(f"{info.train.documents + info.held_out.documents:,} documents, vocabulary of {info.vocab_size:,}")
    if info.kind == "chat":
        learned = f"{info.train.targets / info.train.tokens:.0%} of the training tokens are learned"
        print(f"conversations: {learned}; left out, for want of an answer: {info.left_out:,}")
    return json.loads(info.to_json())


def _train(verbs: Any) -> None:
    parser = _verb(verbs, "train", _run_train, "train a model from a recipe; the same command resumes")
    parser.add_argument("recipe", help="a TOML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as model.hidden_size=512")
    parser.add_argument("--output", help="folder of the run (runs/NAME OF THE RECIPE)")


def _run_train(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.progress import TrainingProgress, say
    from longwave.training.loop import Trainer
    from longwave.training.metrics import read_metrics
    from longwave.training.recipe import read_recipe

    output = Path(options.output or Path("runs") / Path(options.recipe).stem)
    trainer = Trainer(read_recipe(options.recipe, options.overrides), output)
    if trainer.step:
        say(f"{output}: resuming after step {trainer.step}")
    for line in [*trainer.model.describe(), *trainer.data.notes()]:
        say(line)
    trainer.watch(TrainingProgress(output.name, trainer.recipe.training.steps, trainer.step))
    trainer.run()
    last = read_metrics(output / "metrics.jsonl")[-1]
    print(f"{output / 'model'}: held-out loss {last['held_out_loss']:.4f} after {last['tokens']:,} tokens")
    return {"model": str(output / "model"), **last}


def _eval(verbs: Any) -> None:
    parser = _verb(verbs, "eval", _run_eval, "loss of a model on held-out text, in the mode in which it runs")
    parser.add_argument("model", help="a model folder")
    parser.add_argument("data", help="prepared data, written with the model's own tokenizer")
    parser.add_argument("--window", type=int, help="tokens of a window (the model's context window)")
    parser.add_argument("--device", default="auto", help=_DEVICES)


def _run_eval(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.evaluation.held_out import evaluate_folder

    result = evaluate_folder(options.model, options.data, options.window, options.device)
    for name, value in result.items():
        print(f"{name:<16} {value}")
    return result


def _generate(verbs: Any) -> None:
    parser = _verb(verbs, "generate", _run_generate, "continue prompts")
    parser.add_argument("model", help="a model folder")
    parser.add_argument("--prompt", action="append", default=[], help="can be given several times; stdin without any")
    parser.add_argument("--prompt-file", action="append", default=[], help="a file that holds one prompt")
    parser.add_argument("--chat", action="store_true", help="prompts are what a user says, answered by the assistant")
    parser.add_argument("--max-new-tokens", type=int, default=128, help="tokens at most (128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-k", type=int, help="draw among so many of the likeliest tokens (all)")
    parser.add_argument("--top-p", type=float, default=1.0, help="draw among the likeliest of this total share (1.0)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws, where there is a temperature (0)")
    parser.add_argument("--stop", action="append", default=[], help="a string that ends a text")
    parser.add_argument("--device", default="auto", help=_DEVICES)
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16", "fp64"), help="of the weights; as saved by default")


def _run_generate(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.inference.command import generate_command

    return generate_command(options)


def _plan(verbs: Any) -> None:
    parser = _verb(verbs, "plan", _run_plan, "parameters, FLOPs and state bytes, before they are paid")
    parser.add_argument("model", help="a recipe, or a folder of which only config.json need exist")
    parser.add_argument("--context", default="4096", help="token counts, such as 4096,1M")
    parser.add_argument("--dtype", choices=("fp32", "bf16", "fp16"), default="bf16", help="of weights and activations")


def _run_plan(options: argparse.Namespace) -> dict[str, Any]:
    from longwave import plan
    from longwave.device import dtype_of

    config, contexts, dtype = (
        plan.model_config(options.model),
        plan.parse_sizes(options.context),
        dtype_of(options.dtype),
    )
    print(f"{config.layout}  (hidden {config.hidden_size}, vocabulary {config.vocab_size:,})")
    for context in contexts:
        plan.show(plan.costs_at(config, context, dtype), context, dtype)
    return plan.to_json(config, contexts, dtype)


def _inspect(verbs: Any) -> None:
    parser = _verb(verbs, "inspect", _run_inspect, "a page of one text: what is kept, where attention goes, the cost")
    parser.add_argument("model", help="a model folder")
    parser.add_argument("text", nargs="?", help="a text file, or - for stdin")
    parser.add_argument("--text", dest="literal", metavar="TEXT", help="the text itself, in place of a file")
    parser.add_argument("--against", metavar="DIR", help="a model with the same tokenizer, to compare attention with")
    parser.add_argument("--layers", help="blocks whose attention to draw, such as 0,5 (a few)")
    parser.add_argument("--heads", help="heads to draw beside the mean of all, such as 0,3 (the first two)")
    parser.add_argument("--first", type=int, metavar="N", help="the first N tokens of the text alone")
    parser.add_argument("--output", default="inspect.html", help="the page to write (inspect.html)")
    parser.add_argument("--device", default="auto", help=_DEVICES)


def _run_inspect(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.inspection.command import inspect_command

    return inspect_command(options)


def _bench(verbs: Any) -> None:
    help = "time models or ops beside what is possible, the output checked first; compare two runs"
    kinds = verbs.add_parser("bench", help=help, description=help).add_subparsers(metavar="KIND", required=True)
    for kind, what in {"inference": "prefill and decoding", "training": "training steps"}.items():
        parser = _verb(kinds, kind, _run_bench, f"time {what} of a model against another")
        parser.set_defaults(kind=kind)
        parser.add_argument("model", help="a recipe (random weights) or a model folder")
        parser.add_argument(
            "--against", default="transformers", help="another recipe or folder, 'transformers' or none"
        )
        _measuring(parser)
        if kind == "inference":
            parser.add_argument("--retention", choices=("forced", "real"), help="forced: thresholds at nominal (real)")
            parser.add_argument("--decode-steps", type=int, help="tokens of one round of decoding (32)")
    _bench_ops(kinds)
    _bench_context(kinds)
    parser = _verb(
        kinds, "compare", _run_bench_compare, "compare two runs kept by --save; exit code 1 if one is slower"
    )
    parser.add_argument("before", help="a file that --save wrote")
    parser.add_argument("after", help="another one, of the same models or ops")
    parser.add_argument("--threshold", type=float, default=0.05, help="share that counts as slower (0.05)")


def _bench_ops(kinds: Any) -> None:
    parser = _verb(kinds, "ops", _run_bench_ops, "time every op in each of its forms, checked against its reference")
    parser.add_argument("model", nargs="?", help="a recipe or folder whose sizes to take; options go before them")
    parser.add_argument("--ops", type=lambda text: text.split(","), help="which ops, such as attention; all by default")
    parser.add_argument("--heads", type=int, help="query heads (12)")
    parser.add_argument("--kv-heads", type=int, help="KV heads (4, or as many as --heads)")
    parser.add_argument("--head-size", type=int, help="channels of a head (64)")
    parser.add_argument("--hidden-size", type=int, help="channels of a layer (768)")
    parser.add_argument("--vocab-size", type=int, help="rows of the head (32000)")
    parser.add_argument("--window", type=int, help="a sliding window to time as well")
    parser.add_argument("--blocks", type=int, help="blocks of 64 keys that a query of block_sparse sees (96)")
    parser.add_argument("--forms", type=lambda text: text.split(","), help="which forms; all that there are by default")
    parser.add_argument("--no-backward", dest="backward", action="store_false", default=None, help="forward only")
    _measuring(parser)


def _bench_context(kinds: Any) -> None:
    help = "stream real text of growing length through a model, beside a dense one: time, memory, how they grow"
    parser = _verb(kinds, "context", _run_bench_context, help)
    parser.add_argument("model", nargs="?", help="a recipe (random weights) or a model folder (a small SALA)")
    parser.add_argument("--against", default="dense", help="another recipe or folder, none, or its dense twin (dense)")
    parser.add_argument("--contexts", help="token counts, ascending (4k,16k,64k,256k,1M)")
    parser.add_argument("--chunk", type=int, help="tokens that are run at a time (4096)")
    parser.add_argument("--decode-steps", type=int, help="tokens decoded at each context (16)")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="after which a model is stopped (600)")
    parser.add_argument("--memory", metavar="BYTES", help="most beyond the weights, such as 8G (what is free)")
    parser.add_argument("--retention", choices=("forced", "real"), help="forced: thresholds at nominal (real)")
    parser.add_argument("--text", help="a text file or folder; the Python standard library by default")
    parser.add_argument("--repeats", type=int, help="passes over the whole sequence, of which medians are taken (1)")
    _running(parser)


def _measuring(parser: argparse.ArgumentParser) -> None:
    """What every measurement at given contexts takes."""
    parser.add_argument("--contexts", default="2048,8192", help="token counts, such as 2048,64k")
    parser.add_argument("--batch", dest="batches", default="1", help="batch sizes, such as 1,8")
    parser.add_argument("--repeats", type=int, help="interleaved rounds, of which medians are taken (5)")
    _running(parser)


def _running(parser: argparse.ArgumentParser) -> None:
    """Where a measurement runs, and what it leaves."""
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of activations (fp32)")
    parser.add_argument("--threads", type=int, help="threads of the CPU (as PyTorch takes them)")
    parser.add_argument("--device", default="auto", help=_DEVICES)
    parser.add_argument("--save", metavar="FILE.json", help="keep the results, for bench compare")
    parser.add_argument("--plot", metavar="FILE.svg|png", help="a picture (takes the extra 'plot')")
    parser.add_argument("--profile", metavar="FILE.json[.gz]", help="a trace of one more run of each, for Perfetto")


def _run_bench(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.benchmarks.command import bench_models

    return bench_models(options)


def _run_bench_ops(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.benchmarks.command import bench_ops

    return bench_ops(options)


def _run_bench_context(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.benchmarks.command import bench_context

    return bench_context(options)


def _run_bench_compare(options: argparse.Namespace) -> dict[str, Any]:
    from longwave.benchmarks.command import bench_compare

    return bench_compare(options)


if __name__ == "__main__":
    sys.exit(main())
