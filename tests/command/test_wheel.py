"""The wheel: everything that the package reads at run time is in it, and it works where nothing else of ours is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks, commands

READ_AT_RUN_TIME = {".toml", ".c", ".h", ".html", ".js", ".css", ".typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy of what a clone holds, with the tools that are installed here."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "longwave", source / "longwave", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", target, source]
    subprocess.run([sys.executable, "-m", "pip", *map(str, words)], check=True, timeout=300)
    return next(target.glob("longwave-*.whl"))


def test_everything_that_is_read_at_run_time_is_in_the_wheel(wheel: Path):
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = [path for path in (ROOT / "longwave").rglob("*") if path.suffix in READ_AT_RUN_TIME | {".py"}]
    needed = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert {Path(name).suffix for name in needed} == READ_AT_RUN_TIME | {".py"}
    assert sorted(needed - inside) == []
    kinds = {path.suffix for path in (ROOT / "longwave").rglob("*") if path.is_file()} - {".pyc"}
    assert kinds == READ_AT_RUN_TIME | {".py"}, "a new kind of file: put it into package-data, and here"


def test_nothing_else_is_in_the_wheel(wheel: Path):
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top.split("-")[0] for top in tops} == {"longwave"}


def test_the_metadata_says_what_is_true(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    text = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    metadata = Parser().parsestr(text)
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    needed = [one for one in metadata.get_all("Requires-Dist", []) if "extra ==" not in one]
    assert [one for one in needed if ">=" not in one] == [], "a dependency without a lowest version"


def test_the_lowest_versions_are_those_of_the_project():
    """`make test-lowest` installs what pyproject.toml calls the lowest."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    lowest = dict(one.split(",")[0].split(">=") for one in dependencies)
    lines = [line for line in (ROOT / "tests/lowest.txt").read_text().splitlines() if not line.startswith("#")]
    pinned = {name: version.removesuffix(".*") for name, version in (line.split("==") for line in lines)}
    assert pinned.keys() == lowest.keys()
    assert [name for name in lowest if not f"{pinned[name]}.0.0".startswith(lowest[name])] == []


@pytest.mark.slow
def test_the_wheel_runs_the_readme_in_an_empty_environment(wheel: Path, tmp_path: Path):
    """Its dependencies are those of this environment; longwave comes from the wheel, and nothing of the clone is near.

    The main job runs as a trial; then every command of the README that a reader can type without a clone.
    """
    home = tmp_path / "env"
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {"PATH": f"{home / 'bin'}:/usr/bin:/bin", "LONGWAVE_TRIAL": "1", "HOME": str(tmp_path)}

    def run(*words: str) -> str:
        command = [str(home / "bin/python"), "-m", *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=500, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run(
        [home / "bin/python", "-c", "import longwave; print(longwave.__file__)"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert where.stdout.startswith(str(home))
    run("longwave", "quickstart")
    assert (tmp_path / "quickstart/report.html").exists()
    for block in blocks(ROOT / "README.md"):
        if block.language == "sh" and block.needs is None:
            for words in commands(block):
                run(*words)
        elif block.language == "python":
            (tmp_path / "block.py").write_text(block.text)
            run("block")
