"""Recall tasks solved by string search: what a model that reads everything would say, and one that guesses."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from longwave.data.recall.scoring import found_in
from longwave.data.tokenizer import Tokenizer

CORPUS = [
    "the cat and the dog are good, not bad: The code of the old apple is 12345.\n",
    "Which words come most often? A list of sentences, variables and lines to copy. ABC = DEF\n",
]


def solved(prompt: str) -> list[str]:
    """The answers to a prompt of any family but questions, found in its text alone."""
    *_, question = (body for body in prompt.split("\n") if body)
    text = prompt[: prompt.rindex(question)]
    codes = re.findall(r"The code of the (\w+ \w+) is (\d+)\.", text)
    if "codes of the" in question and "order" not in question:
        return [code for name, code in codes if f"the {name}?" in question]
    if "code" in question:
        return [
            dict(codes)[name] for name in re.findall(r"the (\w+ \w+)(?=\?|,| and the)", question.split("?")[0] + "?")
        ]
    if "variables" in question:
        return _variables(text, question)
    if "copy" in question:
        return re.findall(r"Copy this line: (.*)", text)
    if most := re.search(r"Which (\d) words", question):
        words = text.split(":\n")[1].split()
        return [word for word, _ in Counter(words).most_common(int(most[1]))]
    return re.findall(rf"^{re.escape(question)} (.*)$", text, re.MULTILINE)


def _variables(text: str, question: str) -> list[str]:
    found = re.findall(r"\d+", question)[:1]
    for name, source in re.findall(r"^([A-Z]{3}) = (\w+)$", text, re.MULTILINE):
        found += [name] if source in found else []
    return found[1:]


def is_solved(prompt: str, answers: Sequence[str]) -> bool:
    """Whether string search finds the answers, and no other."""
    said = solved(prompt)
    return len(said) == len(answers) and found_in(answers, ", ".join(said)) == 1


def metaspace() -> Tokenizer:
    """A tokenizer as SentencePiece makes them: a blank before a text, blanks as letters, bytes for what it lacks."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()  # only here, so that no token holds two words
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    backend.train_from_iterator(CORPUS * 9, trainer)
    made = json.loads(backend.to_str())
    vocabulary = made["model"]["vocab"]
    made["model"]["vocab"] = vocabulary | {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    made["pre_tokenizer"] = None
    backend = Backend.from_str(json.dumps(made))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def split_words() -> Tokenizer:
    """A byte-level tokenizer of more entries, which puts nothing before a text and ends it with nothing."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 9, trainer)
    return Tokenizer(backend, {})


TOKENIZERS = {
    "byte-level, 300 entries": lambda: Tokenizer.train(CORPUS, 300),
    "byte-level, 450 entries": lambda: Tokenizer.train(CORPUS * 9, 450),
    "SentencePiece": metaspace,
    "a blank before a text, no special tokens": split_words,
}
