"""Every page in headless Chromium: wide, on a phone, in the dark. What a parser cannot see: that pictures show, tables
sort, nothing is cut off, nothing is loaded from elsewhere, and that a page moves while a real run trains."""

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pages import CHROMIUM, Browser
from PIL import Image
from run_folders import add_weights, begin, digits, finish, noise

from vitrail import progress
from vitrail.data.cache import load
from vitrail.pages import compare, report, runs, watch
from vitrail.pages.explainpage import explain_run
from vitrail.training.train import train
from vitrail.weights.checkpoint import Run

# Where it has to be there, as in the workflow that has it set this variable, nothing is skipped: the tests fail.
WANTED = os.environ.get("BROWSER_TESTS") == "required"
pytestmark = pytest.mark.skipif(CHROMIUM is None and not WANTED, reason="there is no Chromium here")
RESULTS = Path(__file__).parent.parent / "results"
SEEDS = [RESULTS / f"digits-seed-{seed}" for seed in range(3)]
VIT_12, LOG = RESULTS / "vit-12-3-epochs", RESULTS / "original-vit-12.json"
LOOKS = ((1280, "light"), (1280, "dark"), (390, "light"))
PAPER = {"light": "rgb(250, 249, 246)", "dark": "rgb(19, 21, 26)"}
CARD = {"light": "rgb(255, 255, 255)", "dark": "rgb(27, 30, 37)"}
FITS = "innerWidth === %d && document.documentElement.scrollWidth <= document.documentElement.clientWidth"
SHOWN = """(async () => {
    for (const image of document.images) { image.loading = 'eager'; await image.decode() }
    return [...document.images].map(image => image.naturalWidth)
})()"""
# Sorts each table by each of its columns, twice, and says which of them did not end up in order.
SORTED = """(() => {
    const wrong = []
    for (const table of document.querySelectorAll('[data-sortable]'))
        for (const [column, head] of [...table.tHead.rows[0].cells].entries())
            for (let click = 0; click < 2; click++) {
                head.firstChild.click()
                const values = [...table.tBodies[0].rows].map(row => Number(row.cells[column].dataset.value))
                const down = head.getAttribute('aria-sort') === 'descending'
                const order = values.toSorted((a, b) => down ? b - a : a - b)
                if (values.some((value, i) => value !== order[i])) wrong.push(head.innerText)
            }
    return wrong
})()"""
POINTED = """(() => {
    const area = document.querySelector('.area'), box = area.getBoundingClientRect()
    area.dispatchEvent(new PointerEvent('pointermove', {clientX: box.right - 1, clientY: box.top}))
    return document.querySelector('.tip').innerText
})()"""
# What a page that moves has had on it: how many epochs, which words below, and where on the screen the curves were.
RECORDED = """(() => {
    const curves = () => Math.round(document.querySelector('#curves').getBoundingClientRect().top)
    scrollBy({top: curves() + 200, behavior: 'instant'})
    Object.assign(window, {rows: new Set(), said: new Set(), places: new Set()})
    new MutationObserver(() => {
        rows.add(document.querySelectorAll('#curves tbody tr').length)
        said.add(document.querySelector('.live span').textContent)
        requestAnimationFrame(() => places.add(curves()))
    }).observe(document.body, {childList: true, subtree: true})
})()"""
# Whether what stands below covers nothing at the end of the page, and is as wide as that.
UNCOVERED = """(() => {
    const {left, right, top, bottom} = document.querySelector('.live').getBoundingClientRect()
    const last = document.querySelector('footer .wrap').getBoundingClientRect().bottom
    const wide = left === 0 && right === document.documentElement.clientWidth
    return last <= top && wide && Math.abs(bottom - innerHeight) < 1
})()"""
UNTIL = """new Promise(done => {
    const look = () => (%s) ? done(performance.now()) : setTimeout(look, 20)
    look()
})"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def look(browser: Browser, page: Path, tables: int) -> list[int]:
    """Look at a page in every way; how wide each of its pictures is in itself, in pixels."""
    widths: list[int] = []
    for width, scheme in LOOKS:
        browser.open(page, width, scheme)
        assert browser.run(FITS % width)
        assert browser.run("getComputedStyle(document.body).backgroundColor") == PAPER[scheme]
        widths = browser.run(SHOWN)
        assert all(widths)
        assert browser.run("document.querySelectorAll('[data-sortable]').length") == tables
        assert browser.run(SORTED) == []
        assert browser.complaints() == []
        assert browser.asked() == {page.as_uri()}
    return widths


def test_report(tmp_path: Path, browser: Browser) -> None:
    dataset, run = digits(), tmp_path / "run"
    add_weights(finish(run, dataset), dataset)
    page = report.write_report(run, dataset)
    widths = look(browser, page, tables=1)
    lit = browser.run("[...document.querySelectorAll('.pair')].map(pair => pair.children.length)")
    assert lit == [2] * 24  # mistakes, and where it was rightest
    assert set(widths) == {8, 144}
    assert browser.run(POINTED) == "epoch 3\ntrain 70.0%\ntest 73.3%"


def test_report_of_two_hundred_classes(tmp_path: Path, browser: Browser) -> None:
    dataset, run = noise(10_000, 200, 64), tmp_path / "run"
    add_weights(finish(run, dataset, epochs=150), dataset)
    page = report.write_report(run, dataset)
    assert page.stat().st_size < 5_000_000
    browser.open(page, 1280)
    loaded = "performance.getEntriesByType('navigation')[0].loadEventEnd"
    assert 0 < browser.run(loaded) < 2000  # milliseconds
    assert all(browser.run(SHOWN))
    assert browser.run("document.querySelectorAll('#classes tbody tr').length") == 200
    assert browser.run(SORTED) == []
    for width in (1280, 390):
        browser.open(page, width)
        assert browser.run(FITS % width)
    assert browser.complaints() == []


def test_comparison(tmp_path: Path, browser: Browser) -> None:
    page = tmp_path / "page.html"
    compare.write_page(page, runs.load([*SEEDS, VIT_12, LOG]))
    look(browser, page, tables=2)
    names = "[...document.querySelectorAll('#figures table')[0].tBodies[0].rows].map(row => row.cells[0].innerText)"
    browser.open(page, 1280)
    browser.run("document.querySelectorAll('#figures th button')[1].click()")
    assert [name.split()[1] for name in browser.run(names)] == ["digits", "original-vit-12", "vit-12-3-epochs"]
    dashes = "getComputedStyle(document.querySelector('.line.dashed')).strokeDasharray"
    assert browser.run(dashes) == "5px, 5px"
    assert browser.run(POINTED).startswith("epoch 150\nA digits –\n")


def test_explanation(tmp_path: Path, browser: Browser) -> None:
    dataset, run = digits(), tmp_path / "run"
    model = add_weights(finish(run, dataset), dataset)
    torch.nn.init.normal_(model.head.weight)  # else it would have learnt no classes, and nothing could speak for one
    Run(run).save_model(model, dataset.classes)
    scans = [tmp_path / f"{i}.png" for i in range(3)]
    for i, scan in enumerate(scans):
        Image.fromarray(dataset.splits["test"].image(i)).save(scan)
    page = explain_run(run, scans, tmp_path / "explained")
    # Each image, two ways to see what it looks at, and its heads; filters, similarities, and their scale.
    assert len(look(browser, page, tables=0)) == 3 * 4 + 3


def test_the_original_behind(browser: Browser, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for file in VIT_12.iterdir():
        (run / file.name).write_bytes(file.read_bytes())
    browser.open(report.write_report(run, None), 1280)
    assert browser.run(POINTED).splitlines()[:2] == ["epoch 3", "original, val 17.7%"]
    assert browser.run("document.querySelectorAll('.line.plain.dashed').length") == 2  # of accuracy, and of loss


def test_what_stands_below_a_page_that_moves(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(watch, "EVERY", 0.1)
    run, moved = begin(tmp_path / "run"), tmp_path / "moved"
    words = "step 234,567/876,543 · epoch 123.4/300 · loss 0.123 · accuracy 0.987 · 12,345 images/s · 12 h 34 min left"
    (run / "progress.json").write_text(json.dumps({"words": words, "share": 0.25}))
    with watch.listen(watch.Watched(run, None), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        for width, scheme in LOOKS:
            browser.open(f"http://127.0.0.1:{server.server_address[1]}/", width, scheme)
            browser.run(UNTIL % f"document.querySelector('.live').innerText === '{words}'")
            assert browser.run(FITS % width)
            assert browser.run("getComputedStyle(document.querySelector('.live')).backgroundColor") == CARD[scheme]
            browser.run("scrollTo({top: 1e9, behavior: 'instant'})")
            assert browser.run(UNCOVERED)
            assert browser.complaints() == []
        (run / "progress.json").unlink()
        browser.run(UNTIL % "document.querySelector('.live').innerText === 'not training now'")
        parts = "[...document.querySelectorAll('main > *')].map(part => part.outerHTML).join()"
        before = browser.run(parts)
        run.rename(moved)
        browser.run(UNTIL % f"document.querySelector('.live').innerText === 'there is no run folder {run}.'")
        assert browser.run(parts) == before
        moved.rename(run)
        browser.run(UNTIL % "document.querySelector('.live').innerText === 'not training now'")
        lines = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(lines + lines.splitlines()[-1].replace('"epoch": 3', '"epoch": 4') + "\n")
        browser.run(UNTIL % "document.querySelectorAll('#curves tbody tr').length === 4")
        server.shutdown()
        server.server_close()
        browser.run(UNTIL % "document.querySelector('.live').innerText.startsWith('vitrail watch has ended')")
        assert "epoch 4" in browser.run(POINTED)
        browser.open("about:blank", 1280)  # which asks no more


def test_it_moves_while_a_run_trains(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setattr(watch, "EVERY", 0.1)
    monkeypatch.setattr(progress, "NOTE", 0.1)
    run = tmp_path / "run"
    train("digits", output=run, stop_after=2, epochs=10, image_size=8, hidden_size=16, mlp_dim=16, num_layers=1,
          num_heads=1, batch_size=64)  # fmt: skip
    (run / "results.json").unlink()  # else it would be done until it goes on
    with watch.listen(watch.Watched(run, load("digits", 8)), "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/"
        browser.open(url, 390)
        browser.run(UNTIL % "document.querySelector('.live').innerText === 'not training now'")
        browser.run("document.querySelector('#curves details').open = true")
        browser.run(RECORDED)
        train(output=run, resume=True)
        browser.run(UNTIL % "document.querySelector('.live').innerText === 'done'")
        browser.run(UNTIL % "document.querySelector('#mistakes .pair')")
        seen, said, places = (browser.run(f"[...{name}]") for name in ("rows", "said", "places"))
        assert seen == sorted(seen)
        assert len(seen) >= 3  # it moved before it was done
        assert seen[-1] == 10
        assert any(words.startswith("step ") for words in said)
        assert places == [-200]  # what is looked at stays there, whatever grows above it
        assert browser.run("document.querySelector('#curves details').open")
        assert browser.run(SORTED) == []
        assert all(browser.run(SHOWN))
        assert browser.run(FITS % 390)
        assert {address.removeprefix(url) for address in browser.asked()} == {"", "state"}
        assert browser.complaints() == []
        browser.open("about:blank", 1280)  # which asks no more
        server.shutdown()
