"""The compiled kernels against the plain forms, alone and in company, and what happens where they cannot be built."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernels import Calls, needs_kernels
from op_inputs import of_runs
from torch import Tensor

from longwave.cli import doctor
from longwave.errors import UserError
from longwave.ops import compiled
from longwave.ops import linear as linear_op
from longwave.ops.attention import ATTENTION, Pattern, attention
from longwave.ops.forms import Call
from longwave.ops.linear import LINEAR, few_rows, linear

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
ERROR = {torch.float32: 3e-6, torch.bfloat16: 5e-3}  # of the largest entry; bf16 rounds its result to 2^-9


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(found: Tensor, right: Tensor) -> float:
    assert found.shape == right.shape
    return float((found.double() - right.double()).abs().max() / right.double().abs().max())


def remembered(groups: int, keys: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Keys (G, N, K) as a state holds them."""
    return random(groups, keys, size, seed=seed, dtype=dtype)


# --- one query over remembered keys -----------------------------------------------------------------------------------


@needs_kernels
@dtypes
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (12, 4), (5, 1), (16, 1), (16, 2)], ids=str)
@pytest.mark.parametrize("size", [32, 64, 96, 128, 160])
@pytest.mark.parametrize("keys", [1, 2, 17, 1023, 1024, 1025, 2500])
def test_one_query_has_parity_with_reference(dtype, heads, groups, size, keys):
    query = random(1, heads, size, dtype=dtype)
    key, value = (remembered(groups, keys, size, dtype, seed) for seed in (1, 2))
    with torch.no_grad(), Calls() as calls:
        found = attention(query, *of_runs([key], [value], (1,)), scale=0.3, form="compiled").output
    assert calls.names == ["one_query_attention"]
    assert found.dtype == dtype
    right = attention(
        query.double(), *of_runs([key.double()], [value.double()], (1,)), scale=0.3, form="reference"
    ).output
    assert error(found, right) < ERROR[dtype]


@needs_kernels
@given(
    runs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 20),
)
def test_single_queries_among_other_runs_are_what_they_are_alone(runs, window):
    """Runs of none, one and several queries in one stream: every row is right, and single ones the same to the bit."""
    lengths = tuple(length for length, _ in runs)
    query = random(sum(lengths), 4, 32)
    keys, values = (
        [remembered(2, past + length, 32, torch.float32, seed + at) for at, (length, past) in enumerate(runs)]
        for seed in (10, 20)
    )
    options = {"pattern": Pattern(window), "scale": 0.2}
    with torch.no_grad():
        found = attention(query, *of_runs(keys, values, lengths), **options, form="compiled").output
        for run, (piece, own) in enumerate(zip(found.split(lengths), query.split(lengths), strict=True)):
            own_keys = of_runs([keys[run]], [values[run]], (len(own),))
            alone = attention(own, *own_keys, **options, form="compiled").output
            assert torch.equal(piece, alone)
    if sum(lengths):
        right = attention(query, *of_runs(keys, values, lengths), **options, form="reference").output
        assert error(found, right) < ERROR[torch.float32]


@needs_kernels
@dtypes
def test_large_and_tiny_scores_are_weighed_as_the_reference_does(dtype):
    """A query far along a key, so that all but one weight vanish, and one that sees all keys alike."""
    key, value = (remembered(1, 1500, 32, dtype, seed) for seed in (1, 2))
    for query in (300 * key[:, 1100].unsqueeze(0), torch.zeros(1, 1, 32, dtype=dtype)):
        with torch.no_grad():
            found = attention(query, *of_runs([key], [value], (1,)), scale=1.0, form="compiled").output
        right = attention(
            query.double(), *of_runs([key.double()], [value.double()], (1,)), scale=1.0, form="reference"
        ).output
        assert error(found, right) < ERROR[dtype]


@needs_kernels
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_visible(bad):
    key, value = (remembered(1, 50, 32, torch.float32, seed) for seed in (1, 2))
    value[0, 7] = bad
    with torch.no_grad():
        found = attention(random(1, 1, 32), *of_runs([key], [value], (1,)), scale=1.0, form="compiled").output
    assert not found.isfinite().any()


@needs_kernels
def test_the_number_of_threads_changes_nothing():
    query = random(3, 8, 64)
    keys, values = ([remembered(2, n, 64, torch.float32, seed) for n in (5, 3000, 1024)] for seed in (1, 2))
    laid, weight, hidden = of_runs(keys, values, (1, 1, 1)), random(96, 64), random(3, 64)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        with torch.no_grad():
            found.append(attention(query, *laid, scale=0.2, form="compiled").output)
            found.append(few_rows.linear(hidden, weight, None))
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(found, found[2:], strict=False))


@needs_kernels
def test_training_other_types_and_odd_shapes_go_to_torch():
    """The kernel is for inference in the types and sizes that it knows; nothing else reaches it."""
    cases = [
        (torch.float64, 64, False),
        (torch.float32, 24, False),
        (torch.float32, 64, True),
    ]
    for dtype, size, grad in cases:
        query = random(1, 2, size, dtype=dtype)
        key, value = (remembered(2, 9, size, dtype, seed) for seed in (1, 2))
        with torch.set_grad_enabled(grad), Calls() as calls:
            found = attention(query, *of_runs([key], [value], (1,)), scale=0.2, form="compiled").output
        assert calls.names == []
        right = attention(
            query.double(), *of_runs([key.double()], [value.double()], (1,)), scale=0.2, form="reference"
        ).output
        assert error(found, right) < ERROR[torch.float32]


# --- few rows ---------------------------------------------------------------------------------------------------------


@needs_kernels
@dtypes
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", range(1, 9))
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 4), (64, 8), (768, 36), (2080, 12)])
def test_few_rows_have_parity_with_reference_and_do_not_know_each_other(dtype, bias, rows, inputs, outputs):
    hidden, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, seed=1, dtype=dtype)
    shift = random(outputs, seed=2, dtype=dtype) if bias else None
    with torch.no_grad(), Calls() as calls:
        found = linear(hidden, weight, shift)
        alone = torch.cat([linear(row, weight, shift) for row in hidden.split(1)])
    assert calls.names == ["linear_few_rows"] * (rows + 1)
    assert torch.equal(found, alone)
    right = linear_op.reference(hidden.double(), weight.double(), None if shift is None else shift.double())
    assert error(found, right) < ERROR[dtype]


@needs_kernels
@pytest.mark.parametrize("rows", [9, 13, 24, 32, 64])
def test_as_many_rows_as_texts_run_together_do_not_know_each_other_in_bf16(rows):
    hidden, weight = random(rows, 96, dtype=torch.bfloat16), random(20, 96, seed=1, dtype=torch.bfloat16)
    with torch.no_grad(), Calls() as calls:
        found = linear(hidden, weight)
    assert calls.names == ["linear_few_rows"]
    assert torch.equal(found, torch.cat([few_rows.linear(row, weight, None) for row in hidden.split(1)]))
    assert error(found, hidden.double() @ weight.double().T) < ERROR[torch.bfloat16]


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "dtype"),
    [(17, 64, 4, torch.float32), (1, 40, 4, torch.float32), (1, 64, 5, torch.float32), (1, 64, 4, torch.float64)],
    ids=["many rows", "odd inputs", "odd outputs", "fp64"],
)
def test_other_products_go_to_torch(rows, inputs, outputs, dtype):
    hidden, weight = random(rows, inputs, dtype=dtype), random(outputs, inputs, seed=1, dtype=dtype)
    with torch.no_grad(), Calls() as calls:
        found = linear(hidden, weight)
        turned = linear(hidden, weight.T.contiguous().T)  # the same weight, not row by row in memory
    assert calls.names == []
    assert error(found, hidden.double() @ weight.double().T) < ERROR[torch.float32]
    assert error(turned, hidden.double() @ weight.double().T) < ERROR[torch.float32]


@needs_kernels
def test_rounding_to_bf16_is_torchs_own():
    """Every fp32 sum is rounded to the nearest, to even in a tie, and NaN stays NaN."""
    weight = torch.zeros(2, 32, dtype=torch.bfloat16)
    weight[0, 0] = weight[1, 0] = weight[0, 1] = 1.0
    for first, second in [(1.0, 2.0**-8), (1.0, 3 * 2.0**-9), (1.0078125, 2.0**-8), (torch.nan, 0.0), (torch.inf, 1.0)]:
        hidden = torch.zeros(1, 32, dtype=torch.bfloat16)
        hidden[0, :2] = torch.tensor([first, second])
        with torch.no_grad():
            found = few_rows.linear(hidden, weight, None)[0, 0]
        right = (torch.tensor(first, dtype=torch.bfloat16).float() + hidden[0, 1].float()).bfloat16()
        assert torch.equal(found, right) or (found.isnan() and right.isnan())


# --- where they cannot be built ---------------------------------------------------------------------------------------


def compiler(folder: Path, *lines: str) -> Path:
    """A folder for PATH in which `cc` is a shell script of these lines."""
    folder.mkdir(exist_ok=True)
    script = folder / "cc"
    script.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    script.chmod(0o755)
    return folder


def copying(folder: Path) -> Path:
    """A compiler that is done at once: it gives the library that the kernels of this process came from."""
    built = compiled.library()._name
    return compiler(folder, 'for one; do last="$target"; target="$one"; done', f'/bin/cp "{built}" "$last"')


@pytest.fixture
def first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str | None]:
    """Looks for kernels as on a new machine, where PATH is the given folder alone; the reason why there are none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(path: Path, **seconds: float) -> str | None:
        with monkeypatch.context() as patched:
            patched.setenv("PATH", str(path))
            for name, value in seconds.items():
                patched.setattr(compiled, name, value)
            patched.setattr(compiled, "library", compiled.library.__wrapped__)
            return compiled.why_not.__wrapped__()

    return call


COMPILERS = {
    "cc failed: cc: error: unknown flag": ["echo 'cc: error: unknown flag' >&2", "exit 1"],
    "cc failed: no message": ["exit 1"],
    "cc failed: \N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER} is no flag": [
        "printf '\\377\\376 is no flag' >&2",
        "exit 1",
    ],
    "cc failed: xxxx": ["/usr/bin/head -c 1000000 /dev/zero | /usr/bin/tr '\\0' x >&2", "exit 1"],
    "cc did not end within 1 seconds": ["while :; do :; done"],
    "No such file or directory": ["exit 0"],  # it says that all is well, and has written nothing
    "cannot be loaded": ['for one; do last="$target"; target="$one"; done', 'echo no library > "$last"'],
}


@pytest.mark.parametrize("reason", COMPILERS)
def test_a_compiler_that_cannot_is_the_reason(tmp_path: Path, first_use, reason: str):
    found = first_use(compiler(tmp_path / "bin", *COMPILERS[reason]), _LONGEST_BUILD=1.0, _LONGEST_ANSWER=1.0)
    assert found is not None
    assert reason in found
    assert "\n" not in found
    assert len(found) < 1000
    kept = [path.name for path in tmp_path.glob("cache/longwave/*")]
    assert len(kept) == (reason == "cannot be loaded"), "a failed build leaves nothing behind"


def test_a_compiler_that_cannot_be_started_is_the_reason(tmp_path: Path, first_use):
    nothing, odd = tmp_path / "nothing", compiler(tmp_path / "odd")
    nothing.mkdir()
    (odd / "cc").write_bytes(b"\x7fELF, but no program")
    assert first_use(nothing) == "no C compiler (cc, gcc or clang)"
    assert "Exec format error" in str(first_use(odd))


@needs_kernels
def test_a_compiler_is_needed_once(tmp_path: Path, first_use):
    assert first_use(copying(tmp_path / "bin")) is None
    (kept,) = tmp_path.glob("cache/longwave/*")
    assert kept.parent.stat().st_mode & 0o777 == 0o700
    assert first_use(compiler(tmp_path / "bin", '[ "$1" = --version ]')) is None
    assert list(tmp_path.glob("cache/longwave/*")) == [kept]


@needs_kernels
def test_the_seconds_of_a_first_use_are_explained_once(tmp_path: Path, first_use, capsys: pytest.CaptureFixture[str]):
    path = copying(tmp_path / "bin")
    assert first_use(path) is None
    assert capsys.readouterr() == ("", "building longwave's C kernels for this machine, once: some seconds\n")
    assert first_use(path) is None
    assert capsys.readouterr() == ("", "")


@needs_kernels
@pytest.mark.parametrize("stream", ["none", "closed"])
def test_a_build_needs_no_stderr(tmp_path: Path, first_use, monkeypatch: pytest.MonkeyPatch, stream: str):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr("sys.stderr", None if stream == "none" else closed)
    assert first_use(copying(tmp_path / "bin")) is None


@needs_kernels
@pytest.mark.parametrize("damage", ["cut", "emptied", "one bit", "replaced", "a folder", "unreadable link"])
def test_a_damaged_build_is_built_anew(tmp_path: Path, first_use, damage: str):
    """Never loaded: pages that are missing would end the process when they are touched."""
    path = copying(tmp_path / "bin")
    assert first_use(path) is None
    (kept,) = tmp_path.glob("cache/longwave/*")
    content = kept.read_bytes()
    kept.unlink()  # this process has loaded it: damage goes into a file of its own
    match damage:
        case "cut":
            kept.write_bytes(content[: len(content) // 2])
        case "emptied":
            kept.write_bytes(b"")
        case "one bit":
            kept.write_bytes(content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])
        case "replaced":
            kept.write_bytes(b"no shared object")
        case "a folder":
            kept.with_name(f"{kept.name[:24]}-other.so").mkdir()
        case _:
            kept.symlink_to(tmp_path / "nowhere")
    assert first_use(path) is None
    assert kept.read_bytes() == content


@needs_kernels
@pytest.mark.parametrize("planted", ["folder of another", "writable by others", "writable by the group", "a file"])
def test_a_folder_that_others_can_write_is_not_used(tmp_path: Path, first_use, planted: str):
    """A library that somebody else has put there would be run as the user."""
    folder = tmp_path / "cache" / "longwave"
    folder.mkdir(parents=True)
    match planted:
        case "folder of another":
            if os.geteuid():
                pytest.skip("only root can give a folder to another user")
            os.chown(folder, 12345, 12345)
        case "writable by others":
            folder.chmod(0o777)
        case "writable by the group":
            folder.chmod(0o770)
        case _:
            folder.rmdir()
            folder.write_text("")
    assert str(folder) in str(first_use(copying(tmp_path / "bin")))
    assert not folder.is_dir() or not list(folder.iterdir())


def test_no_home_is_the_reason(tmp_path: Path, first_use, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert "XDG_CACHE_HOME" in str(first_use(compiler(tmp_path / "bin", "exit 0")))


def test_doctor_says_why_there_are_none():
    done = subprocess.run(
        [sys.executable, "-m", "longwave", "doctor"],
        env={**os.environ, "LONGWAVE_COMPILED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "no compiled kernels: LONGWAVE_COMPILED=0" in done.stdout


def test_without_them_the_torch_forms_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "why_not", lambda: "no C compiler (cc, gcc or clang)")
    linear_op._form_of.cache_clear()
    try:
        for op in (LINEAR, ATTENTION):
            call = Call(torch.device("cpu"), torch.float32, head_size=64)
            assert op.resolve(call)[0] == "torch"
            assert "no compiled kernels: no C compiler" in op.resolve(call)[1]
            with pytest.raises(UserError, match=f"{op.name} form = 'compiled': no compiled kernels: no C compiler"):
                op.resolve(call, "compiled")
        with torch.no_grad(), Calls() as calls:
            found = linear(random(1, 64), random(4, 64, seed=1))
        assert calls.names == []
        assert error(found, random(1, 64).double() @ random(4, 64, seed=1).double().T) < ERROR[torch.float32]
        assert "no compiled kernels" in doctor.facts()["op linear"]
    finally:
        linear_op._form_of.cache_clear()


@needs_kernels
def test_processes_that_build_at_once_do_not_meet(tmp_path: Path):
    """Four first users of one cache folder: all get their kernels, and one file is left."""
    command = [sys.executable, "-c", "from longwave.ops import compiled; compiled.library()"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PATH": str(copying(tmp_path / "bin"))}
    builders = [subprocess.Popen(command, env=environment) for _ in range(4)]
    assert [builder.wait() for builder in builders] == [0, 0, 0, 0]
    assert len(list((tmp_path / "longwave").iterdir())) == 1
