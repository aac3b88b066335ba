"""GGUF files of ours in llama.cpp's own reader: what it continues a prompt by, beside what longwave does.

    python tools/gguf_in_llama_cpp.py write FOLDER [MODEL...]     # with longwave
    OTHER/bin/python tools/gguf_in_llama_cpp.py read FOLDER       # with xllamacpp, in an environment of its own

`write` saves models with random weights of every kind that is written (llama, qwen2, qwen3; tied, wide heads), and the
folders that are named, each in fp32, bf16 and Q8_0, with the greedy continuation by longwave in fp32. `read` loads each
file and prints a line of JSON: whether the prompt has the same tokens, and how many characters of the continuation are
the same. It exits with 1 if a file in fp32 has other tokens or another continuation.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

PROMPT, ANSWER = "def main(argv):\n    return 1234", 32
SHAPE: dict[str, Any] = {"layout": "3F", "hidden_size": 128, "context_window": 256, "mlp": {"size": 256}}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {"attention": {"heads": 4, "kv_heads": 2}, "rotary": {"base": 5000.0}},
    "llama tied": {"attention": {"heads": 4}, "tie_embeddings": True},
    "llama wide heads": {"attention": {"heads": 2, "head_size": 96}},
    "qwen2": {"attention": {"heads": 4, "kv_heads": 2, "qkv_bias": True}},
    "qwen3": {"attention": {"heads": 4, "kv_heads": 2, "qk_norm": True, "head_size": 64}},
}


def write(folder: Path, models: list[str]) -> None:
    """Saves every model in every type, and what longwave says of it."""
    import torch

    import longwave as lw

    expected: dict[str, Any] = {}
    for name, model in [*random_models().items(), *((Path(one).name, lw.load(one, dtype="fp32")) for one in models)]:
        assert model.tokenizer is not None
        text = str(lw.generate(model, PROMPT, max_new_tokens=ANSWER))
        expected[name] = {"tokens": model.tokenizer.encode(PROMPT, add_bos=True), "text": text}
        lw.save(model, folder / f"{name}.fp32.gguf", format="gguf")
        lw.save(model, folder / f"{name}.q8_0.gguf", format="gguf-q8_0")
        lw.save(model.to(torch.bfloat16), folder / f"{name}.bf16.gguf", format="gguf")
    (folder / "expected.json").write_text(json.dumps(expected))


def random_models() -> dict[str, Any]:
    """A model of every kind, with a tokenizer of the standard library's text."""
    import pydoc_data.topics

    import torch

    from longwave.config import ModelConfig, build
    from longwave.data.tokenizer import Tokenizer
    from longwave.model import Decoder

    tokenizer, found = Tokenizer.train(pydoc_data.topics.topics.values(), 600), dict[str, Any]()
    for name, values in KINDS.items():
        config = build(ModelConfig, SHAPE | {"vocab_size": tokenizer.vocab_size} | values, "gguf_in_llama_cpp")
        model, generator = Decoder(config, seed=1).eval(), torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
        model.tokenizer, found[name] = tokenizer, model
    return found


def asked(server: Any, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The reply of llama.cpp's server, which runs in this process."""
    content, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    request = urllib.request.Request(server.listening_address + path, content, headers)
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


def read(folder: Path) -> int:
    """Loads every file in llama.cpp, and compares."""
    import xllamacpp  # pyright: ignore[reportMissingImports]

    wrong = False
    for name, ours in json.loads((folder / "expected.json").read_text()).items():
        for kind in ("fp32", "bf16", "q8_0"):
            params = xllamacpp.CommonParams()
            params.model.path, params.n_ctx, params.n_parallel = str(folder / f"{name}.{kind}.gguf"), 256, 1
            params.cpuparams.n_threads = 1
            if kind == "fp32":  # otherwise keys, values and sums are rounded
                params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
                params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            server = xllamacpp.Server(params)
            tokens = asked(server, "/tokenize", {"content": PROMPT, "add_special": True})["tokens"]
            options = {"prompt": PROMPT, "n_predict": ANSWER, "temperature": 0, "ignore_eos": True}
            text = asked(server, "/completion", options)["content"]
            differ = (n for n, (a, b) in enumerate(zip(text, ours["text"], strict=False)) if a != b)
            same = next(differ, min(len(text), len(ours["text"])))
            found = {"tokens_alike": tokens == ours["tokens"], "characters": len(ours["text"]), "alike": same}
            print(json.dumps({"model": name, "type": kind, **found}), flush=True)
            wrong |= tokens != ours["tokens"] or (kind == "fp32" and same < len(ours["text"]))
    return int(wrong)


if __name__ == "__main__":
    action, place, *named = sys.argv[1:]
    Path(place).mkdir(parents=True, exist_ok=True)
    sys.exit(write(Path(place), named) if action == "write" else read(Path(place)))
