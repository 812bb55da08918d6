"""A headless Chromium that looks at one page and reports what it found."""

import json
import re
import shutil
import subprocess
import tempfile
from html import escape, unescape
from pathlib import Path

CHROMIUM = shutil.which("chromium")
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,900",
    "--virtual-time-budget=2000",
]

# Runs beside the page, not in it: the page under test is the true one, policy and all.
_LOOK = """
const inner = document.getElementById("page").contentWindow, page = inner.document;
const size = e => { const b = e.getBoundingClientRect(); return [b.width, b.height]; };
const pictures = [...page.querySelectorAll('svg[role="img"]')];
document.getElementById("found").textContent = JSON.stringify({
  pictures: pictures.map(size),
  drawn: pictures.map(p => [...p.querySelectorAll("path, text, use")].filter(
    e => Math.max(...size(e)) > 0).length),
  letters: pictures.map(p => 9 * size(p)[0] / p.viewBox.baseVal.width),
  width: Math.max(page.documentElement.scrollWidth, page.body.scrollWidth),
  view: page.documentElement.clientWidth,
  requests: inner.performance.getEntriesByType("resource").map(r => r.name),
});
"""


def _chromium(*arguments: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def look(page: str, width: int, folder: Path) -> dict[str, list]:
    """Show a page in a frame of the given width and measure it."""
    wrapper = folder / f"wrapper-{width}.html"
    wrapper.write_text(
        '<!DOCTYPE html><meta charset="utf-8"><pre id="found"></pre>'
        f'<iframe id="page" style="border:0;width:{width}px;height:800px" '
        f'srcdoc="{escape(page)}"></iframe>'
        f"<script>addEventListener('load', () => {{ {_LOOK} }})</script>",
        encoding="utf-8",
        errors="replace",
    )
    dump = _chromium("--dump-dom", wrapper.as_uri()).stdout
    found = re.search(r'<pre id="found">(.*?)</pre>', dump, re.DOTALL)
    assert found, "the page was not loaded"
    return json.loads(unescape(found[1]))


def console_of(page: Path) -> list[str]:
    """Open a page by itself and return the lines of its console."""
    log = _chromium("--enable-logging=stderr", "--v=0", "--dump-dom", page.as_uri()).stderr
    return [line for line in log.splitlines() if "CONSOLE" in line]


def dom_of(address: str) -> str:
    """Return a page as it stands after its scripts have run."""
    return _chromium("--dump-dom", address).stdout
