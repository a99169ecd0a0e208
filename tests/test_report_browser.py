"""The report in headless Chromium: its script runs, nothing is refused or missing, and it fits every width and color scheme."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import graphprune as gp
from graphprune.artifact.manifest import Manifest
from tests.browser import BROWSER, DRIVER, MISSING, Browser
from tests.report_pages import make_artifact, make_benchmark

pytest.importorskip("onnx", reason="the ONNX target needs the extra onnx")
pytestmark = pytest.mark.skipif(BROWSER is None or DRIVER is None, reason=MISSING)

_CONTRAST = """
const light = (color) => {
  const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((value) => {
    const part = value / 255;
    return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let item = element; item; item = item.parentElement) {
    const color = getComputedStyle(item).backgroundColor;
    if (!/, 0\\)$|transparent/.test(color)) return color;
  }
  return getComputedStyle(document.documentElement).colorScheme === "dark" ? "rgb(0,0,0)" : "rgb(255,255,255)";
};
const poor = [];
for (const element of document.querySelectorAll("body *:not(script):not(style)")) {
  const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!text || element.closest(".hidden, .skip, noscript") || !element.checkVisibility()) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(element instanceof SVGElement ? style.fill : style.color), light(behind(element))];
  const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  if (ratio < 4.5) poor.push(`${element.tagName}.${element.className}: ${ratio.toFixed(2)}`);
}
return poor;
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("browser") / "artifact")


@pytest.fixture(scope="module")
def page(artifact: Path) -> Path:
    make_benchmark(artifact.parent / "bench.json", artifact)
    return gp.report(artifact, artifact.parent / "report.html", bench=artifact.parent / "bench.json").path


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def test_it_shows_the_manifests_numbers_and_the_console_is_clean(browser: Browser, page: Path, artifact: Path) -> None:
    browser.open(page)
    manifest = Manifest.read(artifact)
    shown = browser.ask(
        "return Object.fromEntries([...document.querySelectorAll('data')].map((e) => [e.dataset.key, [e.value, e.innerText]]))"
    )
    assert shown["sparsity"] == [str(manifest.sparsity()), f"{manifest.sparsity():.4f}"]
    for site in manifest.sites:
        assert shown[f"sites.{site.name}.sparsity"] == [str(site.sparsity), f"{site.sparsity:.4f}"]
        assert shown[f"sites.{site.name}.zeros"] == [str(site.zeros), f"{site.zeros:,}"]
    assert shown["metrics.accuracy"] == ["0.8712345", "0.8712"]
    assert browser.ask("return document.querySelector('.verdict').innerText").startswith("Verified")
    assert browser.ask("return performance.getEntriesByType('resource').length") == 0
    assert browser.console() == []


def test_the_console_is_really_watched(browser: Browser, page: Path, tmp_path: Path) -> None:
    html = page.read_text(encoding="utf-8")
    (tmp_path / "edited.html").write_text(html.replace('"use strict";', '"use strict"; missing();'), encoding="utf-8")
    browser.open(tmp_path / "edited.html")
    assert "Content Security Policy" in "".join(browser.console())  # the script is not the one that was written
    assert not browser.ask("return document.querySelector('canvas.thumb').dataset.drawn ?? null")


def test_masks_are_drawn(browser: Browser, page: Path, artifact: Path) -> None:
    browser.open(page)
    kept = browser.ask(
        "return [...document.querySelectorAll('canvas.thumb')].map((e) => {"
        "const pixels = e.getContext('2d').getImageData(0, 0, e.width, e.height).data;"
        "return pixels.filter((value, index) => index % 4 === 3 && value === 255).length})"
    )
    assert kept == [site.weights - site.zeros for site in Manifest.read(artifact).sites]
    browser.ask("document.querySelector('.mask-card').open = true")
    browser.ask("return new Promise((done) => setTimeout(done, 100))")
    sizes = browser.ask(
        "return [...document.querySelectorAll('.mask-card[open] .views canvas')].map((e) => [e.width, e.dataset.drawn])"
    )
    assert sizes == [[16, "yes"], [16 * 8, "yes"]]


def test_the_pointer_reads_the_curves(browser: Browser, page: Path) -> None:
    browser.open(page)
    reading = browser.ask(
        "const box = document.querySelector('.curves .chart').getBoundingClientRect();"
        "document.querySelector('.curves').dispatchEvent(new PointerEvent('pointermove', {clientX: box.right}));"
        "return document.querySelector('.reading').textContent"
    )
    assert reading.startswith("step 19: sparsity 0.5000, loss ")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_it_fits_and_can_be_read(browser: Browser, page: Path, width: int, dark: bool) -> None:
    browser.open(page, width=width, dark=dark)
    browser.ask("for (const item of document.querySelectorAll('details')) item.open = true")
    assert browser.ask("return document.documentElement.scrollWidth") <= width
    over = browser.ask(
        "return [...document.querySelectorAll('body *')].filter((e) => !e.closest('.scroll, .hidden, .skip, svg') && "
        f"e.getBoundingClientRect().right > {width} + 0.5).map((e) => e.tagName + '.' + e.className)"
    )
    assert over == []
    assert browser.ask(_CONTRAST) == []
    background = browser.ask("return getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(17, 19, 21)") == dark


def test_paper_is_white_and_shows_all_rows(browser: Browser, page: Path, tmp_path: Path) -> None:
    html = page.read_text(encoding="utf-8").replace("data-print open", "data-print")
    (tmp_path / "closed.html").write_text(html, encoding="utf-8")
    browser.open(tmp_path / "closed.html", dark=True, media="print")
    assert browser.ask("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    rows = "return document.querySelector('.rows').open"
    assert not browser.ask(rows)
    assert browser.ask(f"dispatchEvent(new Event('beforeprint')); {rows}")
    assert not browser.ask(f"dispatchEvent(new Event('afterprint')); {rows}")
    browser.paper(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert browser.console() == []
