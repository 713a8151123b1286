"""The panel in JupyterLab and as the server's own page, in a real Chromium. Writes screenshots to .out/."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support import REPOSITORY

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
PICTURES = REPOSITORY / ".out"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
TIMEOUT_MS = 20_000  # for what should take a tenth of it

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        not Path(CHROMIUM).exists() and os.environ.get("REQUIRE_BROWSER") != "1", reason="no Chromium here"
    ),
]

SERVE = """
import random, threading, time
import serving_kit

def shout(texts):
    time.sleep(0.01 + 0.003 * len(texts))
    return [text.upper() for text in texts]

server = serving_kit.serve(shout, port=0, max_queue_size=64)
going = threading.Event()
going.set()

def client():
    while going.is_set():
        try:
            server("test")
        except Exception:
            time.sleep(0.1)
        time.sleep(random.expovariate(10))

clients = [threading.Thread(target=client, daemon=True) for _ in range(12)]
for each in clients:
    each.start()
"""
OVERLOAD = """
def reverse(texts):
    time.sleep(0.012 + 0.003 * len(texts))
    if random.random() < 0.01:
        raise LookupError("deep inside the model")
    return [text[::-1] for text in texts]

server = serving_kit.serve(reverse, port=0, name="overload", max_batch_size=16)
rate = 6

def one_of_many():
    while going.is_set():
        try:
            server("test")
        except Exception:
            time.sleep(0.05)
        time.sleep(random.expovariate(rate))

crowd = [threading.Thread(target=one_of_many, daemon=True) for _ in range(60)]
for each in crowd[:16]:
    each.start()
"""
WORSE = """
time.sleep(12)
server.tune(max_batch_size=4)
time.sleep(5)
server.tune(max_queue_size=12)
for each in crowd[16:]:
    each.start()
time.sleep(7)
"""
NOTEBOOKS = {
    "panel": [SERVE, "server", "time.sleep(6)", "going.clear(); server.stop()", "server"],
    # To be run all at once: the panel is followed by cells that keep the kernel busy from its first moment.
    "overload": [f"{SERVE}\nserver.stop()\n{OVERLOAD}", "server", WORSE, "going.clear()\nserver"],
    "all": [SERVE, "server", "time.sleep(10)", "import asyncio\nawait asyncio.sleep(12)"],
}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A JupyterLab of its own, with nothing of the user's; gives its URL."""
    root, home = tmp_path_factory.mktemp("lab"), tmp_path_factory.mktemp("home")
    blank = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    # Without a kernelspec JupyterLab asks for one in a dialog that swallows every click.
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for name, sources in NOTEBOOKS.items():
        cells = [{"id": f"cell{i}", "source": source, **blank} for i, source in enumerate(sources)]
        notebook = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
        (root / f"{name}.ipynb").write_text(json.dumps(notebook))
    shutil.copy(REPOSITORY / "notebooks" / "01_quickstart.ipynb", root)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    places = (
        "JUPYTER_CONFIG_DIR JUPYTER_RUNTIME_DIR IPYTHONDIR JUPYTERLAB_SETTINGS_DIR JUPYTERLAB_WORKSPACES_DIR"
    )
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"]
    command += [f"--port={port}", "--ServerApp.port_retries=0", f"--ServerApp.root_dir={root}"]
    command += ["--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=None"]
    settings = home / "jupyterlab_settings_dir" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with open(home / "log", "wb") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, **{place: str(home / place.lower()) for place in places.split()}},
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 30
        while not answers(f"http://127.0.0.1:{port}/api"):
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)


def answers(url):
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return response.read()
    except OSError:
        return None


@contextmanager
def chromium(expected_log="$^", **more):
    """A page that may connect to this machine only, and must log no error to its console."""
    from playwright.sync_api import sync_playwright

    elsewhere, logged = [], []

    def check(route):
        if re.match(r"(http|ws)s?://127\.0\.0\.1[:/]", route.request.url):
            route.continue_()
        else:
            elsewhere.append(route.request.url)
            route.abort()

    PICTURES.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        page = browser.new_page(viewport={"width": 1280, "height": 1000}, **more)
        page.set_default_timeout(TIMEOUT_MS)
        page.route("**/*", check)
        page.on("console", lambda message: message.type == "error" and logged.append(message.text))
        page.on("pageerror", lambda error: logged.append(str(error)))
        try:
            yield page
        except BaseException:
            page.screenshot(path=PICTURES / "failed.png", full_page=True)
            raise
        finally:
            browser.close()
    assert elsewhere == []
    assert [line for line in logged if not re.search(expected_log, line)] == []


def read(panel, name):
    return float(panel.locator(f'[data-number="{name}"]').text_content().replace(",", "").replace("–", "nan"))


def until(page, condition, seconds=10.0):
    """Wait on the browser's own clock: playwright handles no event during time.sleep."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    return met


def setting(url, name="max_batch_size"):
    return json.loads(answers(f"{url}/settings"))[name]


def settled(page, panel, url):
    """The batch size in force, once the panel says the same and asks for no other value."""
    field = panel.get_by_label("max_batch_size, items")

    def agreed():
        value = setting(url)
        said = panel.get_by_text(f"max_batch_size {value}: in force since").count()
        return said and field.input_value() == str(value) and value

    value = until(page, agreed)
    assert value
    return value


def drag(page, slider, to):
    """Pull the thumb to a share of the slider, as a hand does."""
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    level = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, level)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * to, level, steps=8)
    page.mouse.up()


def cell(page, index):
    return page.locator(".jp-Notebook .jp-CodeCell").nth(index)


def run_cell(page, index):
    cell(page, index).locator(".cm-content").click()
    page.keyboard.press("Shift+Enter")


def run_first_cell(page):
    """JupyterLab may drop what is run while its session settles, although the kernel says idle."""
    prompt = cell(page, 0).locator(".jp-InputPrompt")
    for _ in range(4):
        run_cell(page, 0)
        if until(page, lambda: prompt.text_content() != "[ ]:", seconds=5):
            return


def has_run(page, index, number):
    cell(page, index).locator(f'.jp-InputPrompt:has-text("[{number}]:")').wait_for()


def test_jupyterlab(lab):
    with chromium() as page:
        page.goto(f"{lab}/lab/tree/panel.ipynb?reset")
        cell(page, 4).wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        run_first_cell(page)
        has_run(page, 0, 1)
        run_cell(page, 1)
        panel = page.locator(".sk").first
        panel.wait_for()
        url = re.search(r"http://127\.0\.0\.1:\d+", panel.locator("code").text_content())[0]
        slider = panel.get_by_role("slider", name="max_batch_size")

        # The numbers move while requests flow.
        before = read(panel, "ok")
        assert until(page, lambda: read(panel, "ok") > before + 20)
        assert read(panel, "p99 ms") >= read(panel, "p50 ms") > 5

        # The very first touch of a slider, while a cell runs. (A hand needs a moment to get there.)
        panel.get_by_text("Copy token").wait_for()
        run_cell(page, 2)
        page.wait_for_timeout(300)
        drag(page, slider, 0.25)
        assert until(page, lambda: setting(url) < 16, seconds=3)
        moved = settled(page, panel, url)
        assert cell(page, 2).locator('.jp-InputPrompt:has-text("[*]")').count()
        has_run(page, 2, 3)

        # By keyboard, in an idle kernel; the arrow must not move the notebook's cursor instead.
        slider.focus()
        page.keyboard.press("ArrowRight")
        focus = page.evaluate("document.activeElement.outerHTML")
        assert until(page, lambda: setting(url) > moved), (moved, slider.input_value(), focus)
        drag(page, slider, 0.4)
        assert until(page, lambda: setting(url) > moved + 3)

        # A refused value says why, and what is in force stays and comes back.
        moved = settled(page, panel, url)
        field = panel.get_by_label("max_batch_size, items")
        field.fill("5000")
        field.press("Enter")
        panel.get_by_text("max_batch_size must be a whole number from 1 to 4,096").wait_for()
        assert until(page, lambda: field.input_value() == str(moved))
        assert setting(url) == moved
        panel.get_by_label("group_by_length").uncheck()
        assert until(page, lambda: setting(url, "group_by_length") is False)
        page.wait_for_timeout(1500)
        panel.screenshot(path=PICTURES / "lab-light.png")

        # The theme changes under a living panel.
        page.evaluate("jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})")
        assert until(page, lambda: panel.evaluate("node => getComputedStyle(node).colorScheme") == "dark")
        page.wait_for_timeout(300)
        panel.screenshot(path=PICTURES / "lab-dark.png")

        # A reload brings it back, alive.
        page.evaluate("jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_timeout(1000)
        page.reload()
        panel.wait_for()
        before = read(panel, "ok")
        assert until(page, lambda: read(panel, "ok") > before + 20)
        panel.get_by_text("Copy token").wait_for()
        drag(page, slider, 0.2)
        assert until(page, lambda: setting(url) < moved)
        settled(page, panel, url)

        # The end: the last picture stays, in every view.
        run_cell(page, 3)
        panel.locator(".state", has_text="the server has stopped").wait_for()
        run_cell(page, 4)
        second = page.locator(".sk").nth(1)
        second.locator(".state", has_text="the server has stopped").wait_for()
        assert read(second, "ok") == read(panel, "ok") > 20
        assert read(second, "answers/s") > 0
        assert second.get_by_role("slider", name="max_batch_size").is_disabled()
        assert page.locator('.jp-OutputArea-output[data-mime-type*="stderr"]').count() == 0
        page.evaluate("jupyterapp.commands.execute('docmanager:save')")
        page.wait_for_timeout(500)


def command(page, name, arguments="{}"):
    """Begin one of JupyterLab's commands; some end only when all cells have run."""
    page.evaluate(f"void jupyterapp.commands.execute('{name}', {arguments})")


def test_run_all_and_no_kernel(lab):
    # JupyterLab itself logs an error about the widget that is gone with its kernel.
    with chromium(expected_log="widget model not found") as page:
        page.goto(f"{lab}/lab/tree/all.ipynb?reset")
        cell(page, 3).wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        run_first_cell(page)
        has_run(page, 0, 1)
        command(page, "notebook:run-all-below")
        panel = page.locator(".sk").first
        panel.wait_for()
        url = re.search(r"http://127\.0\.0\.1:\d+", panel.locator("code").first.text_content())[0]
        slider = panel.get_by_role("slider", name="max_batch_size")

        def running(index):
            return cell(page, index).locator('.jp-InputPrompt:has-text("[*]")').count() == 1

        # The first touch ever comes while a blocking cell runs that was there before the panel was.
        panel.get_by_text("Copy token").wait_for(timeout=5000)
        drag(page, slider, 0.25)
        assert until(page, lambda: setting(url) < 16, seconds=3)
        moved = settled(page, panel, url)
        assert running(2)

        # Then during a cell that awaits.
        assert until(page, lambda: not running(2))
        page.wait_for_timeout(500)
        for to in (0.5, 0.3, 0.6):
            drag(page, slider, to)
        assert until(page, lambda: setting(url) > moved + 10, seconds=3)
        settled(page, panel, url)
        assert running(3)
        assert until(page, lambda: not running(3), seconds=20)

        # The static card is there, but out of sight for as long as the panel lives.
        card = page.locator(".jp-OutputArea [data-serving-kit]")
        assert card.count() == 1
        assert not card.is_visible()
        page.wait_for_timeout(10_000)  # the card in the notebook is renewed every 10 s
        command(page, "docmanager:save")
        page.wait_for_timeout(1000)

        # Without its kernel the notebook shows the card, and no error.
        page.evaluate("jupyterapp.serviceManager.sessions.shutdownAll()")
        page.goto("about:blank")
        page.goto(f"{lab}/lab/tree/all.ipynb?reset")
        card.wait_for()
        page.wait_for_timeout(4000)
        assert card.is_visible()
        assert card.locator("img").is_visible()
        assert int(re.search(r"answered([\d,]+)", card.text_content())[1].replace(",", "")) > 20
        assert not page.get_by_text("Error displaying widget").is_visible()
        cell(page, 1).screenshot(path=PICTURES / "lab-no-kernel.png")


def test_overload_and_errors(lab):
    frames = []

    def on_frame(data):
        if isinstance(data, bytes) and b'"buffer_paths"' in data:
            frames.append(data)

    def listen(socket):
        socket.on("framereceived", on_frame)

    with chromium() as page:
        page.on("websocket", listen)
        page.goto(f"{lab}/lab/tree/overload.ipynb?reset")
        cell(page, 3).wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        command(page, "application:toggle-left-area")
        command(page, "apputils:change-theme", "{theme: 'JupyterLab Light'}")
        run_first_cell(page)
        has_run(page, 0, 1)
        run_cell(page, 1)
        panel = page.locator(".sk").first
        panel.wait_for()
        state = panel.locator(".state")
        assert state.text_content() == "● ready"
        run_cell(page, 2)
        assert until(page, lambda: state.text_content() == "● overloaded", seconds=30)
        assert until(page, lambda: read(panel, "shed") > 100)
        page.wait_for_timeout(3500)
        panel.screenshot(path=PICTURES / "lab-overload.png")
        if os.environ.get("UPDATE_PICTURES") == "1":
            shutil.copy(PICTURES / "lab-overload.png", REPOSITORY / "docs" / "panel.png")
        assert read(panel, "p99 ms") > 0
        assert panel.get_by_text(re.compile("This panel costs .* ms and .* kB per second")).count() == 1

        # Every chart tells one second: the newest, or the one under the cursor.
        requests = panel.get_by_role("img", name="Requests per second: ")

        def arrivals():
            return int(re.search(r"in ([\d,]+)", requests.get_attribute("aria-label"))[1].replace(",", ""))

        assert arrivals() > 50
        box = requests.bounding_box()
        page.mouse.move(box["x"] + 45, box["y"] + 20)
        assert until(page, lambda: arrivals() == 0)
        page.mouse.move(5, 5)
        assert until(page, lambda: arrivals() > 50)
        charts = panel.get_by_role("group", name="The last two minutes")
        charts.focus()
        for _ in range(28):
            page.keyboard.press("ArrowLeft")
        assert until(page, lambda: arrivals() < 50)
        page.keyboard.press("Escape")
        assert until(page, lambda: arrivals() > 50)

        # What failed, with its traceback, and nothing printed into a cell.
        failures = panel.locator(".errors > summary")
        assert "last incident" in failures.text_content()
        failures.click()
        panel.locator(".errors details summary").first.click()
        trace = panel.locator("pre").first
        assert "LookupError: deep inside the model" in trace.text_content()
        assert page.locator('.jp-OutputArea-output[data-mime-type*="stderr"]').count() == 0
        panel.get_by_text("8 more").click()
        page.set_viewport_size({"width": 1280, "height": 1700})
        command(page, "apputils:change-theme", "{theme: 'JupyterLab Dark'}")
        assert until(page, lambda: panel.evaluate("node => getComputedStyle(node).colorScheme") == "dark")
        page.wait_for_timeout(300)
        panel.screenshot(path=PICTURES / "lab-overload-dark.png")
        command(page, "apputils:change-theme", "{theme: 'JupyterLab Light'}")

        # Out of sight nothing is sent; back in sight it comes at once.
        page.set_viewport_size({"width": 1280, "height": 600})
        cell(page, 0).scroll_into_view_if_needed()
        page.evaluate("document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0")
        page.wait_for_timeout(4000)
        frames.clear()
        page.wait_for_timeout(1500)
        assert frames == []
        panel.scroll_into_view_if_needed()
        assert until(page, lambda: len(frames) > 2, seconds=3)

        # A second view is as live, and right at once; what is out of sight is not drawn.
        page.set_viewport_size({"width": 1280, "height": 3200})
        run_cell(page, 3)
        has_run(page, 3, 4)
        second = page.locator(".sk").nth(1)
        second.wait_for()
        assert until(page, lambda: read(second, "ok") == read(panel, "ok") > 1000)
        drag(page, second.get_by_role("slider", name="max_batch_size"), 0.5)
        batch_size = panel.get_by_label("max_batch_size, items")
        assert until(page, lambda: float(batch_size.input_value()) > 16)
        assert second.get_by_label("max_batch_size, items").input_value() == batch_size.input_value()
        command(page, "docmanager:save")
        page.wait_for_timeout(500)


def test_quickstart(lab):
    with chromium() as page:
        page.goto(f"{lab}/lab/tree/01_quickstart.ipynb?reset")
        page.set_viewport_size({"width": 1280, "height": 5000})  # what is out of sight is not drawn
        first, last = cell(page, 0), cell(page, -1)
        first.wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for()
        prompt = last.locator(".jp-InputPrompt")
        for _ in range(4):  # as in run_first_cell; before the kernel is there, only the first cell is run
            command(page, "notebook:run-all-cells")
            if until(page, lambda: prompt.text_content() != "[ ]:", seconds=5):
                break
        panel = page.locator(".sk").first
        panel.wait_for(timeout=60_000)
        before = read(panel, "ok")
        assert until(page, lambda: read(panel, "ok") > before, seconds=30)
        panel.locator(".state", has_text="the server has stopped").wait_for(timeout=60_000)
        assert read(panel, "ok") > 600
        assert read(panel, "shed") > 0
        last.locator(".jp-InputPrompt", has_text=re.compile(r"\[\d+\]")).wait_for()
        assert page.locator('.jp-OutputArea-output[data-mime-type*="stderr"]').count() == 0
        command(page, "docmanager:save")
        page.wait_for_timeout(500)


@pytest.fixture
def busy(serve):
    """A server with some traffic."""

    def shout(texts):
        time.sleep(0.01 + 0.003 * len(texts))
        return [text.upper() for text in texts]

    server, going = serve(shout, max_queue_size=64), True

    def client():
        while going:
            try:
                server("test")
            except Exception:
                time.sleep(0.1)
            time.sleep(random.expovariate(10))

    clients = [threading.Thread(target=client, daemon=True) for _ in range(12)]
    for each in clients:
        each.start()
    yield server
    going = False
    for each in clients:
        each.join(5)


def test_page(busy):
    url = busy.url
    with chromium(expected_log="status of 401") as page:
        page.goto(f"{url}/")
        panel = page.locator(".sk")
        assert until(page, lambda: panel.count() and read(panel, "ok") > 20)
        before = read(panel, "ok")
        assert until(page, lambda: read(panel, "ok") > before + 20)
        assert panel.locator("code").text_content().endswith(f" {url}/")

        # Read-only without the token.
        slider, token = panel.get_by_role("slider", name="max_batch_size"), panel.get_by_placeholder("token")
        assert slider.is_disabled()
        token.fill("wrong")
        token.press("Enter")
        drag(page, slider, 0.2)
        panel.get_by_text("changing settings needs the token").wait_for()
        assert setting(url) == 32
        token.fill(busy.token)
        token.press("Enter")
        drag(page, slider, 0.1)
        assert until(page, lambda: setting(url) < 16)
        panel.screenshot(path=PICTURES / "page-light.png")

        page.emulate_media(color_scheme="dark")
        page.set_viewport_size({"width": 380, "height": 900})
        page.wait_for_timeout(600)
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
        page.screenshot(path=PICTURES / "page-phone-dark.png", full_page=True)

        # Under a proxy's prefix, also without the last slash.
        prefix = f"{url}/user/me/proxy/8000"
        page.route(f"{prefix}**", lambda route: route.continue_(url=route.request.url.replace(prefix, url)))
        page.goto(prefix)
        assert until(page, lambda: panel.count() and read(panel, "ok") > 40)
        assert panel.locator("code").text_content().endswith(f" {prefix}/")
