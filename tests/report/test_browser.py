"""The page in a real browser: nothing said on the console, nothing asked of the network, nothing cut off."""

import json
import re
import shutil
import socket
import subprocess
import threading

import pytest

from medllm_jax.report.collect import collect
from medllm_jax.report.page import write_page
from tests.evaluation.test_evaluate import EXAM

_LEAST_LETTERS = 11  # pixels

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt-get install chromium")

_MEASURE = """<script>
const width = document.documentElement.clientWidth;

// What reaches beyond the window's right edge, unless it can be scrolled to within a container of its own.
function cut() {
  const found = [];
  for (const each of document.querySelectorAll("body *")) {
    const moves = (e) => ["auto", "scroll"].includes(getComputedStyle(e).overflowX);
    const scrolls = (e) => e && (moves(e) || scrolls(e.parentElement));
    const box = each.getBoundingClientRect();
    if (box.width && (box.right > width + 1 || box.left < -1) && !scrolls(each.parentElement)) found.push(each.tagName);
    if (each.tagName == "IMG" && !each.naturalWidth) found.push("IMG without a picture");
  }
  return found;
}

// Of each picture: how wide it is shown, the shape it is shown in against its own, and its smallest letters in pixels.
const pictures = () => [...document.querySelectorAll("figure img")].map((img) => {
  const svg = new DOMParser().parseFromString(atob(img.src.split(",")[1]), "image/svg+xml").documentElement;
  const sizes = [...svg.querySelectorAll("text, tspan")].map((each) =>
    parseFloat(each.style.fontSize || each.getAttribute("style").match(/([0-9.]+)px/)[1]));
  const shape = (img.clientWidth / img.clientHeight) / (img.naturalWidth / img.naturalHeight);
  return {width: img.clientWidth, shape, letters: Math.min(...sizes) * img.clientWidth / svg.viewBox.baseVal.width};
});

// Tables wider than their container: whether their names stay where they are when the rest is scrolled.
const wide = () => [...document.querySelectorAll(".scroll")].filter((e) => e.scrollWidth > e.clientWidth).map((e) => {
  const name = e.querySelector("tbody th"), before = name.getBoundingClientRect().left;
  e.scrollLeft = 60;
  return e.scrollLeft > 0 && Math.abs(name.getBoundingClientRect().left - before) < 2;
});

// A number's link opens the list that it leads to.
function reached() {
  const link = document.querySelector("td a[href^='#']");
  if (!link) return null;
  const list = document.querySelector(link.hash), before = list.checkVisibility();
  link.click();
  return {before, after: list.checkVisibility()};
}

const found = {reached: reached()};
document.querySelectorAll("details").forEach((each) => each.open = true);
const whole = document.documentElement.scrollWidth;
Object.assign(found, {width, whole, cut: cut(), pictures: pictures(), wide: wide()});
parent.postMessage(JSON.stringify(found), "*");
</script></body>"""
# A window can't be as narrow as a phone; a frame can.
_FRAME = """<body><iframe src="{page}" width="{width}" height="30000" style="border: 0"></iframe><script>
addEventListener("message", (message) => document.body.dataset.measured = message.data);
</script></body>"""


class Proxy:
    """Counts whoever asks it for anything, and answers nothing."""

    def __enter__(self):
        self.asked = []
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port = self._socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()
        return self

    def _serve(self):
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(200).split(b"\r\n")[0].decode("latin-1"))

    def __exit__(self, *_):
        self._socket.close()


def opened(html, folder, width):
    """What the browser says of a page so many pixels wide: sizes, what is cut, console lines, requests."""
    page, file = folder / f"page-{width}.html", folder / f"frame-{width}.html"
    page.write_text(html.replace("</body>", _MEASURE), encoding="utf-8")
    file.write_text(_FRAME.format(page=page.name, width=width), encoding="utf-8")
    with Proxy() as proxy:
        flags = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"),
            *(f"--proxy-server=127.0.0.1:{proxy.port}", "--proxy-bypass-list=<-loopback>", "--dump-dom"),
            *(f"--user-data-dir={folder / f'profile-{width}'}", "--window-size=1600,900", "--timeout=20000"),
        ]
        done = subprocess.run([CHROMIUM, *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    measured = re.search(r'data-measured="([^"]*)"', done.stdout)
    assert measured, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    # The browser's own questions for updates go to its maker.
    asked = [line for line in proxy.asked if "google" not in line and "gvt1" not in line]
    return json.loads(measured[1].replace("&quot;", '"')), console, asked


@pytest.mark.parametrize("width", [400, 1400])
def test_the_report_in_a_browser(place, tmp_path, width):
    runs, results = collect(map(str, (place / "cpt", place / "rpo", place / "exams/base")))
    page = write_page(runs, results, tmp_path / "out", ["all"], [EXAM])
    measured, console, asked = opened(page.read_text("utf-8"), tmp_path, width)
    assert {name: measured[name] for name in ("width", "whole", "cut")} == {"width": width, "whole": width, "cut": []}
    assert console == [] and asked == []
    assert measured["reached"] == {"before": False, "after": True}
    assert all(measured["wide"]) and (measured["wide"] or width > 400)
    pictures = measured["pictures"]
    assert len(pictures) >= 9 and all(abs(each["shape"] - 1) < 0.02 for each in pictures)
    assert min(each["width"] for each in pictures) > (340 if width == 400 else 400)
    assert min(each["letters"] for each in pictures) >= _LEAST_LETTERS


def test_the_measure_sees_what_is_wrong(tmp_path):
    html = (
        '<html><body><div style="width: 700px">wide</div>'
        '<div style="overflow-x: auto"><p style="width: 900px">x</p></div>'
        '<img src="http://elsewhere.invalid/a.png"><script>console.error("bad")</script></body></html>'
    )
    measured, console, asked = opened(html, tmp_path, 500)
    assert measured["cut"] == ["DIV", "IMG without a picture"] and measured["whole"] > measured["width"]
    assert any("bad" in line for line in console) and any("elsewhere.invalid" in line for line in asked)
