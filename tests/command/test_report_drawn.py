"""The report's page in a browser: it draws all of it offline, without an error. Skipped, and told, without Chromium."""

# ruff: noqa: E501, RUF001 (scripts of a line; the page writes ×, so the tests read it)

import dataclasses
import json
import re

import pytest
from reports import (
    bare_report,
    drawn,
    drawn_file,
    fake_report,
    hostile_report,
    is_ready,
    three_models,
    twelve_runs,
    written,
)


def test_a_browser_draws_the_charts_and_the_passage(tmp_path):
    page = drawn(fake_report(steps=200, tokens=300), tmp_path)
    assert is_ready(page)
    assert page.count("<svg") == 4
    assert page.count('<g class="series') == 4 + 1 + 4 + 4
    assert '<path d="M' in page
    assert not re.search(BAND, page), "one run tells of no spread"
    assert page.count("data-index=") == 300
    assert "×1.08 slower" in page
    assert 'data-tip="transformers allocates its state' in page


def test_a_browser_shows_hostile_text_as_text(tmp_path):
    page = drawn(hostile_report(), tmp_path)
    assert is_ready(page)
    assert "<img" not in page
    assert "&lt;/script&gt;&lt;img src=x onerror=alert(1)&gt;" in page


def test_a_browser_draws_three_models_and_their_gaps_to_the_baseline(tmp_path):
    data = dataclasses.replace(twelve_runs(steps=48), baseline="subllm")
    page = drawn(dataclasses.replace(data, speed=three_models().speed), tmp_path)
    assert is_ready(page)
    assert "Gap to SUBLLM" in page
    assert 'data-column="LLAMA"' in page


def test_a_browser_draws_a_report_with_hardly_anything_in_it(tmp_path):
    page = drawn(bare_report(), tmp_path)
    assert is_ready(page)
    for section in ("notes", "retention", "passage", "samples", "facts", "reproduce"):
        assert re.search(rf'<section id="{section}"[^>]*hidden', page), section
    assert page.count('class="missing"') == 3


def test_hovering_reads_out_every_series_at_that_step(tmp_path):
    data = fake_report(steps=200, tokens=30)
    hover = """
      const canvas = document.querySelector("#loss-chart .canvas"), box = canvas.getBoundingClientRect();
      canvas.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right, clientY: box.top + 50 }));
    """
    page = drawn(data, tmp_path, hover)
    tip = re.sub(r"<[^>]*>", " ", page[page.index('<div id="tip"') : page.index('<script type="application/json"')])
    llama, subllm = (model.runs[0] for model in data.models)
    assert "819k tokens" in tip
    for name, point in (("Llama training", llama.train[-1]), ("SUBLLM training", subllm.train[-1])):
        assert re.search(rf"{name} +{point.loss:.4f}", tip), tip
    last = llama.held_out[-1]
    assert (last.step, last.tokens) == (192, 786_432)
    assert re.search(rf"Llama held-out +{last.loss:.4f} +at 786k ", tip), tip


def test_every_button_and_every_token_answers_without_an_error(tmp_path):
    poke = """
      for (const button of document.querySelectorAll("button")) button.click();
      for (const host of document.querySelectorAll("[data-index], [data-tip]"))
        host.dispatchEvent(new PointerEvent("pointerover", { clientX: 9, clientY: 9, bubbles: true }));
      document.documentElement.dataset.poked = document.querySelectorAll(".muted").length;
    """
    data = fake_report(steps=20, tokens=50)
    page = drawn(data, tmp_path, poke)
    assert is_ready(page)
    shown = sum(len(token.kept) == 2 for token in data.passage.tokens)
    assert f'data-poked="{50 - shown}"' in page


def test_the_page_says_how_busy_the_machine_was_and_why_figures_differ(tmp_path):
    data = bare_report()
    speed = dataclasses.replace(data.speed, note="This machine was busy.", disturbed=True)
    page = drawn(dataclasses.replace(data, speed=speed, curve_note="Of the first 4 of 9 windows."), tmp_path)
    assert '<p id="speed-words" class="alarm">This machine was busy.</p>' in page
    assert "Of the first 4 of 9 windows." in page


def test_an_error_in_the_page_is_told(tmp_path):
    page = drawn(bare_report(), tmp_path, "throw new Error('a planted fault')")
    assert not is_ready(page)
    assert "could not be drawn: Uncaught Error: a planted fault" in page


@pytest.mark.parametrize("make", [bare_report, three_models, twelve_runs])
def test_sections_without_data_are_hidden(make, tmp_path):
    page, data = drawn(make(), tmp_path), make()
    assert is_ready(page)
    sections = {
        "statements": data.statements,
        "grids": data.grids,
        "retention": [level for model in data.models for level in model.levels],
        "speed": data.speed.rows,
        "passage": data.passage.tokens,
        "samples": [sample for model in data.models for sample in model.generations],
        "reproduce": data.command,
    }
    hidden = {name for name in sections if re.search(rf'<section id="{name}"[^>]*hidden', page)}
    assert hidden == {name for name, content in sections.items() if not content}


BAND = r'class="band" style="color: var\(--model-(\d)\)[^"]*"><path'
CHOOSE = """
  [...document.querySelectorAll("#axes button")].find(button => button.textContent === "NAME").click();
  document.documentElement.dataset.units = [...document.querySelectorAll("#loss-chart .unit, #gap-chart .unit")].map(one => one.textContent);
"""


@pytest.mark.parametrize(
    ("axis", "unit", "end_together"),
    [("tokens", "tokens", True), ("FLOPs", "FLOPs", False), ("time", "minutes", False)],
)
def test_twelve_runs_are_drawn_against_each_axis(axis, unit, end_together, tmp_path):
    page = drawn(twelve_runs(steps=480), tmp_path, CHOOSE.replace("NAME", axis))
    assert is_ready(page)
    assert f'data-units="{unit} of training,{unit} of training"' in page
    bands = re.findall(BAND, page)
    assert bands == ["0", "1", "2", "3", "1", "2", "3"], "of every model, and of the gap of all but the baseline"
    assert ('id="axis-words">Not all runs end at equal' not in page) == end_together


def test_a_best_value_at_the_edge_of_its_grid_is_told(tmp_path):
    page = drawn(twelve_runs(steps=48), tmp_path)
    assert "deep SUBLLM: best at 0.006, which is at the edge of what was tried" in page
    assert "smaller Llama: best at 0.003.</li>" in page
    assert "Llama: best at 0.003. Training diverged at 0.006.</li>" in page


def test_bits_per_byte_alone_where_tokenizers_differ(tmp_path):
    page = drawn(dataclasses.replace(twelve_runs(steps=48), loss_comparable=False), tmp_path)
    assert is_ready(page)
    assert "read text through different tokenizers" in page
    assert 'data-column="Held-out loss"' not in page
    assert 'data-column="Gap in bits per byte"' in page


@pytest.mark.parametrize("make", [fake_report, twelve_runs])
def test_nothing_is_wider_than_a_phone(make, tmp_path):
    """The page in a frame as wide as a phone, since a window is never narrower than 500 pixels."""
    page = json.dumps(written(make(), tmp_path).text).replace("<", "\\u003c")
    measure = """
      const { body, documentElement } = frame.contentDocument;
      const wide = [...body.querySelectorAll("main *")].filter(one => one.getBoundingClientRect().right > 390 && !one.closest("#passage-text, thead"));
      document.documentElement.dataset.found = [documentElement.dataset.ready, documentElement.scrollWidth - documentElement.clientWidth, ...wide.map(one => one.outerHTML.slice(0, 80))].join(" ");
    """
    path = tmp_path / "phone.html"
    path.write_text(
        '<!doctype html><body><iframe id="phone" style="width: 390px; height: 844px; border: 0"></iframe><script>'
        f"const frame = document.getElementById('phone'); frame.onload = () => {{ {measure} }}; frame.srcdoc = {page};"
        "</script></body>"
    )
    assert re.search('data-found="([^"]*)"', drawn_file(path))[1] == "true 0"
