"""Runs a page in a real Chromium, with a script of the test's own, and returns what that script reports."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=20000",
)  # fmt: skip


def run_in_browser(page: str, script: str, folder: Path, width: int, height: int = 900) -> Any:
    """Show a page in a frame of the given size, run an async script in it, and return the value that it returns.

    The page's policy allows no script but its own, so the test's one is added to the policy by its hash; all else stays.
    """
    browser = next((path for name in NAMES if (path := shutil.which(name))), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(NAMES)} is installed")
    # A headless window cannot be narrower than 500 pixels, and a frame can.
    send = "value => parent.postMessage({value}, '*'), error => parent.postMessage({error: String(error)}, '*')"
    own = f"(async () => {{ {script} }})().then({send});"
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    allowed, count = re.subn("script-src ", f"script-src 'sha256-{digest}' ", page)
    assert count == 1
    (folder / "page.html").write_text(allowed.replace("</body>", f"<script>{own}</script></body>"))
    (folder / "frame.html").write_text(
        '<!DOCTYPE html><pre id="result"></pre>'
        "<script>onmessage = (event) => { document.getElementById('result').textContent = JSON.stringify(event.data); };</script>"
        f'<iframe src="page.html" style="width:{width}px;height:{height}px;border:0"></iframe>'
    )
    command = [
        browser,
        *OPTIONS,
        f"--user-data-dir={folder / 'profile'}",
        f"--window-size={width + 100},{height + 100}",
    ]
    command += ["--dump-dom", (folder / "frame.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    result = re.search(r'<pre id="result">(.*?)</pre>', shown, re.S)
    assert result and result[1], shown[:2000]
    message = json.loads(html.unescape(result[1]))
    assert "error" not in message, message
    return message["value"]
