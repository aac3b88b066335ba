"""What every test runs under: one thread, shapes checked, uninitialised memory poisoned, no GPU test lost."""

from __future__ import annotations

import os
from zlib import crc32

from jaxtyping import config as shapes
from jaxtyping import install_import_hook

# Shapes in annotations are checked in tests only, so the hook has to come before longwave's first import.
CHECKED = install_import_hook("longwave", "checked.check")

import pytest  # noqa: E402
import torch  # noqa: E402
from command_line import Result  # noqa: E402
from hypothesis import settings  # noqa: E402

from longwave.cli import main  # noqa: E402

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("dev", deadline=None, max_examples=25)
settings.register_profile("few", derandomize=True, deadline=None, max_examples=3)
settings.register_profile("thorough", deadline=None, max_examples=500)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "dev"))

NO_GPU = "no CUDA device here"


def pytest_configure(config: pytest.Config) -> None:
    """One thread per process: tests are small, and under xdist a second thread only fights the neighbours."""
    torch.set_num_threads(1)
    # beartype looks at a random item of a list, which hypothesis frowns upon and which decides nothing
    config.addinivalue_line("filterwarnings", "ignore:Do not use the `random` module inside strategies")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, by name and reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=NO_GPU))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Names every GPU test that was skipped, and why."""
    for report in terminalreporter.stats.get("skipped", []):
        if "gpu" in report.keywords:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            terminalreporter.write_line(f"GPU test skipped: {report.nodeid}: {reason}")


@pytest.fixture(autouse=True)
def checked_shapes(request: pytest.FixtureRequest):
    """Shapes are checked in every test of laws and ops, and in a quarter of the others, always the same.

    Checking a call takes longer than most calls, and the others run the same parts again and again.
    """
    test = request.node.nodeid
    always = test.startswith(("tests/laws/", "tests/ops/"))
    shapes.update("jaxtyping_disable", not (always or crc32(test.encode()) % 4 == 0))
    yield
    shapes.update("jaxtyping_disable", True)  # where fixtures of whole modules train


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Memory from `torch.empty` holds NaN, or the largest integer, so that reading what was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def longwave(capsys: pytest.CaptureFixture[str]):
    """Runs the command line in this process."""

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def refuses(longwave):
    """Runs a command that has to be refused: exit code, and one line on stderr that holds every one of some words."""

    def run(*arguments: object, says: list[str], code: int = 2) -> str:
        result = longwave(*arguments)
        line = result.err.splitlines()[-1]
        assert result.code == code, result.err
        assert line.startswith("longwave: ")
        assert result.err.count("longwave: ") == 1
        assert "Traceback" not in result.err
        assert [word for word in says if word not in line] == [], line
        return line

    return run
