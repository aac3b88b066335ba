"""The documentation: its code runs, its site builds without a warning, and its lists are those of the package."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from doc_blocks import LANGUAGES, PAGES, ROOT, Block, blocks, run

import longwave
from longwave import cli
from longwave.blocks import BLOCKS, PARTS
from longwave.checkpoints import save
from longwave.data.shards import prepare
from longwave.data.sources import standard_library
from longwave.data.tokenizer import Tokenizer
from longwave.model import Decoder
from longwave.ops.decay_linear import DECAY_LINEAR
from longwave.resamplers import BRACKETS
from longwave.training.recipe import Recipe, read_recipe

# --- the code ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the pages name: models and data of a quickstart, a Llama, some text, the README.

    The models have the shapes, the vocabulary and the context window that `make quickstart` leaves; they are untrained.
    """
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGWAVE_TRIAL", "1")
        prepare(standard_library, folder / "quickstart/data", vocab_size=4096)
    tokenizer = Tokenizer.load(folder / "quickstart/data")
    for name in ("llama", "subllm"):
        model = Decoder(read_recipe(f"quickstart-{name}").model)
        save(model, folder / "quickstart" / name / "model", tokenizer=tokenizer)
        if name == "llama":
            save(model, folder / "my-llama", tokenizer=tokenizer, format="llama")
    (folder / "my-text").mkdir()
    for path in Path(sysconfig.get_path("stdlib")).glob("*.py"):
        (folder / "my-text" / path.name).write_text(path.read_text()[:9000])
    shutil.copy(ROOT / "README.md", folder)
    return folder


@pytest.fixture
def at_home(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A trial run in a copy of that folder; what a page adds to the tables of parts and forms is taken out again."""
    shutil.copytree(home, tmp_path / "home")
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setenv("LONGWAVE_TRIAL", "1")
    kept = [(table, dict(table)) for table in (PARTS, BLOCKS, BRACKETS)]
    forms = DECAY_LINEAR.forms
    yield
    DECAY_LINEAR.forms = forms
    for table, content in kept:
        table.clear()
        table.update(content)


def run_page(page: Path, long: bool) -> None:
    """Runs every block of a page in order, as a reader would."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: language {block.language!r} is not among {LANGUAGES}"
        run(block, names, long)


LONG = [page for page in PAGES if any(block.needs == "long" for block in blocks(page))]


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_the_code_of_a_page_runs(page: Path):
    run_page(page, long=False)


@pytest.mark.slow
@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize("page", LONG, ids=page_name)
def test_the_long_code_of_a_page_runs(page: Path):
    run_page(page, long=True)


def test_only_few_blocks_are_parsed_alone():
    """Each with its reason; whoever adds one adds it here."""
    parsed = [block for page in PAGES for block in blocks(page) if block.needs]
    assert sorted((page_name(block.page), block.needs) for block in parsed) == [
        ("CONTRIBUTING.md", "network"),
        ("README.md", "network"),
        ("docs/benchmarks.md", "long"),
        ("docs/benchmarks.md", "long"),
        ("docs/conversion.md", "long"),
        ("docs/conversion.md", "long"),
        ("docs/conversion.md", "proof"),
        ("docs/conversion.md", "proof"),
        ("docs/conversion.md", "proof"),
        ("docs/conversion.md", "proof"),
        ("docs/conversion.md", "proof"),
        ("docs/conversion.md", "proof"),
        ("docs/conversion.md", "proof"),
        ("docs/get-started.md", "network"),
        ("docs/get-started.md", "network"),
        ("docs/how-to/compare.md", "long"),
        ("docs/how-to/compare.md", "long"),
        ("docs/how-to/form.md", "long"),
        ("docs/how-to/mixer.md", "tests"),
        ("docs/how-to/resampler.md", "tests"),
        ("docs/how-to/sala.md", "long"),
        ("docs/how-to/train.md", "network"),
        ("docs/index.md", "network"),
        ("docs/subllm-worth.md", "long"),
        ("docs/subllm-worth.md", "long"),
        ("docs/subllm-worth.md", "long"),
    ]


@pytest.mark.parametrize(
    ("language", "text", "needs"),
    [
        ("python", "assert 1 + 1 == 3", None),
        ("python", "import longwave as lw\nlw.load('nothing')", None),
        ("python", "a page that is no Python", "gpu"),
        ("sh", "longwave plan nothing.toml", None),
        ("sh", "longwave bench inference bench-llama --no-such-option x", "long"),
        ("sh", "longwave bench compare nothing.json none.json", None),
        ("sh", "longwave plan longwave/recipes/nothing.toml", "gpu"),
        ("sh", "make quickstart", None),  # not run by these tests, so it has to say why
        ("sh", "make nothing", "network"),
        ("sh", "pip install 'longwave[nothing]'", "network"),
        ("sh", "python -m pytest tests/nothing.py", "tests"),
        ("sh", "rm -rf something", None),
        ("sh", "rm -rf something", "network"),
        ("toml", "[training]\nsteps = 2", None),
    ],
)
def test_a_block_that_is_wrong_is_found(language: str, text: str, needs: str | None, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((AssertionError, SyntaxError, longwave.UserError)):
        run(Block(ROOT / "README.md", 1, language, None, text + "\n", needs), {})


@pytest.mark.parametrize(
    ("text", "code", "said", "right"),
    [
        ("longwave bench compare a.json b.json", 1, "slower in b.json: 1 of 6 rows", True),  # as on a busy machine
        ("longwave bench compare a.json b.json", 1, "a.json: the disk is full", False),
        ("longwave bench compare a.json b.json", 2, "slower in b.json: 1 of 6 rows", False),
        ("longwave bench ops", 1, "slower in b.json: 1 of 6 rows", False),
    ],
)
def test_an_exit_code_is_an_answer_of_one_command_alone(text: str, code: int, said: str, right: bool, monkeypatch):
    def answer(words: list[str]) -> int:
        print(f"longwave: {said}", file=sys.stderr)
        return code

    monkeypatch.setattr(cli, "main", answer)
    with contextlib.nullcontext() if right else pytest.raises(AssertionError, match=f"exit code {code}"):
        run(Block(ROOT / "README.md", 1, "sh", None, text + "\n"), {})


def test_an_unknown_need_is_found(tmp_path: Path):
    (tmp_path / "page.md").write_text("<!-- test: luck -->\n```sh\nmake quickstart\n```\n")
    with pytest.raises(AssertionError, match="luck"):
        list(blocks(tmp_path / "page.md"))


@dataclasses.dataclass(frozen=True)
class Added:
    """What a page adds to longwave's tables, and which contract tests it is held to.

    blocks: how many of the page's first python blocks fill the tables. word: the one that the names of its cases have.
    tests: the files of contract tests. setting: what the page says that `contract.py` has to know, and the cases.
    """

    blocks: int
    word: str
    tests: tuple[str, ...]
    setting: str


ADDED = {  # the mixer's line narrows the letters that brackets are put around, so it comes last
    "resampler": Added(
        2,
        "scattered",
        ("test_laws",),
        "contract.ARGUMENTS['scattered'] = '0.5'; contract.CASES.update(contract.cases_of('', ['scattered']))",
    ),
    "mixer": Added(
        3,
        "C",
        ("test_laws", "test_costs"),
        "contract.CROSSED = 'C'; contract.CASES.update(contract.cases_of('C', ['subllm']))",
    ),
}
ADDING = """
def pytest_configure():  # once conftest.py has set up the checking of shapes
    import contract
    from doc_blocks import ROOT, blocks, run
    from test_docs import ADDED

    for page, added in ADDED.items():
        code = [block for block in blocks(ROOT / f"docs/how-to/{page}.md") if block.language == "python"]
        names = {}
        for block in code[:added.blocks]:
            run(block, names)
        exec(added.setting, {"contract": contract})

def pytest_collection_modifyitems(items):
    from test_docs import ADDED

    def is_held(item, added):
        words = str(item.callspec.params.get("name")).split() if hasattr(item, "callspec") else []
        return added.word in words and item.path.stem in added.tests

    items[:] = [item for item in items if any(is_held(item, added) for added in ADDED.values())]
"""


def held_to_the_contract(folder: Path, profile: str) -> str:
    """Runs the contract tests over the cases that hold what the how-to pages add; returns their report.

    profile: of hypothesis, which says how many examples are drawn.
    """
    (folder / "adding.py").write_text(ADDING)
    paths = [folder, ROOT, ROOT / "tests/support", ROOT / "tests/command"]
    files = sorted({f"tests/laws/{name}.py" for added in ADDED.values() for name in added.tests})
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-vv", "-x", "-p", "adding", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "OMP_NUM_THREADS": "1",
            "HYPOTHESIS_PROFILE": profile,
        },
        capture_output=True,
        text=True,
        timeout=550,
    )
    assert done.returncode == 0, done.stdout  # 5 where no test was left
    return done.stdout


def test_what_a_how_to_adds_keeps_the_contract(tmp_path: Path):
    """Every contract test, with few examples: `make test-slow` draws as many as for longwave's own parts."""
    report = held_to_the_contract(tmp_path, "few")
    assert [added.word for added in ADDED.values() if f" {added.word}]" not in report] == []


@pytest.mark.slow
def test_what_a_how_to_adds_keeps_the_contract_thoroughly(tmp_path: Path):
    held_to_the_contract(tmp_path, "dev")


# --- the lists --------------------------------------------------------------------------------------------------------


def test_the_readme_names_every_module_of_the_package():
    tree = next(block.text for block in blocks(ROOT / "README.md") if block.text.startswith("longwave/\n"))
    lines = [line for line in tree.splitlines() if line.startswith("  ")]
    named = [name for line in lines for name in re.findall(r"[\w.]+(?:\.py|/)(?=,|\s|$)", line.split("  ", 2)[1])]
    inside = [path for path in (ROOT / "longwave").iterdir() if path.name[0] not in "_."]
    there = [path.name + "/" * path.is_dir() for path in inside if path.is_dir() or path.suffix == ".py"]
    assert sorted(named) == sorted(there)


def test_the_readme_names_every_verb():
    usage = next(block.text for block in blocks(ROOT / "README.md") if block.text.startswith("longwave quickstart"))
    assert sorted(set(re.findall(r"^longwave (\w+)", usage, re.MULTILINE))) == sorted(verbs(cli.command_line()))


def verbs(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers right below a parser, by name."""
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found, {}))


def test_the_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", (ROOT / "README.md").read_text())
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_section_of_the_report_is_explained():
    templates = [path for path in (ROOT / "longwave/reports").glob("*.html") if path.stem in ("report", "page")]
    sections = [name for path in templates for name in re.findall(r"<h2>(.*?)</h2>", path.read_text())]
    explained = re.findall(r"^## (.*)$", (ROOT / "docs/how-to/report.md").read_text(), re.MULTILINE)
    assert len(sections) > 5
    assert sorted(explained) == sorted(sections)


# --- the site ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site; a broken link, anchor or docstring reference, or any other warning, fails here."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


def test_the_site_needs_nothing_from_the_network(site: Path):
    """No page, stylesheet or script of ours or the theme's names another host as the place of something it loads."""
    loads = re.compile(r"""<(?:script|img|iframe|source|link)\b[^>]*\b(?:src|href)=["']?(?:https?:)?//""")
    imports = re.compile(r"""@import|url\(["']?(?:https?:)?//""")
    assert [page.name for page in site.rglob("*.html") if loads.search(page.read_text())] == []
    assert [style.name for style in site.rglob("*.css") if imports.search(style.read_text())] == []
    assert (site / "search/search_index.json").exists()


def test_pages_opened_from_disk_can_search(site: Path):
    """The index is a script, and what runs the search in place of a worker lies beside the pages, not elsewhere."""
    assert (site / "search/search_index.js").read_text().startswith("var __index = {")
    for page in (site / "index.html", site / "how-to/train.html"):
        scripts = re.findall(r'<script src="([^"]+)"', page.read_text())
        assert [script for script in scripts if not (page.parent / script).exists()] == []
        assert any("iframe-worker" in script for script in scripts)
    index = json.loads((site / "search/search_index.json").read_text())
    found = {entry["location"] for entry in index["docs"] if "longwave recipes" in entry["text"]}
    assert "reference/command-line.html#longwave-recipes" in found


def test_the_site_tells_every_verb_and_option(site: Path):
    page = (site / "reference/command-line.html").read_text()

    def check(parser: argparse.ArgumentParser) -> None:
        for below in verbs(parser).values():
            check(below)
        if not verbs(parser):
            section = page.split(f'<h2 id="{parser.prog.replace(" ", "-")}">')[1].split("<h2 ")[0]
            for action in parser._actions:
                names = action.option_strings or [action.metavar or action.dest]
                missing = [name for name in names if f"<code>{name}" not in section]
                assert missing == [] or set(names) <= {"-h", "--help", "--json"}, parser.prog

    check(cli.command_line())
    assert "<code>--json</code>" in page


def test_the_site_describes_every_public_name(site: Path):
    page = (site / "reference/python.html").read_text() + (site / "reference/parts.html").read_text()
    page += (site / "reference/recipes.html").read_text()
    homes = {name: f"{getattr(longwave, name).__module__}.{name}" for name in longwave._HOMES}
    named = [name for name in homes if f'id="longwave.{name}"' in page or f'id="{homes[name]}"' in page]
    assert sorted(named) == sorted(homes)


def test_the_site_describes_every_table_of_a_recipe(site: Path):
    page = (site / "reference/recipes.html").read_text()
    tables = {table for part in (*PARTS.values(), *BRACKETS.values()) for table in part.tables.values()}
    assert len(tables) >= 6
    tables |= tables_of(Recipe)
    assert [one for one in tables if f'id="{one.__module__}.{one.__qualname__}"' not in page] == []


def tables_of(kind: Any) -> set[type]:
    """The dataclasses that the fields of a dataclass hold, at any depth."""
    if not dataclasses.is_dataclass(kind):
        return {one for part in typing.get_args(kind) for one in tables_of(part)}
    below = typing.get_type_hints(kind, include_extras=False).values() if isinstance(kind, type) else ()
    found = {one for hint in below for one in tables_of(hint)}
    return found if kind is Recipe else found | {typing.cast(type, kind)}


def test_drawings_stand_in_the_pages_and_follow_the_theme(site: Path):
    drawn = {page: page.read_text().count("drawings/") for page in PAGES if ROOT / "docs" in page.parents}
    for page, count in drawn.items():
        built = (site / page.relative_to(ROOT / "docs")).with_suffix(".html")
        if count:
            assert built.read_text().count('class="drawing"') == count
            assert "<img" not in built.read_text()
