"""Screenshots of what people look at, for the documents: ``make screenshots``.

A real tracking server shows the runs made here; a headless Chromium looks at the experiment, a
comparison of the two latest runs, the report of the champion and the champion's page.
"""

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import tyro
from PIL import Image
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

from components import tracking
from pipelines.compare import compare
from pipelines.rollback import DEFAULT_MODEL
from pipelines.run_local import HOME, exit_on_error, local_or_named_server

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
IMAGES = Path(__file__).parent / "images"
MOST_BYTES = 200_000
COLOURS = 256
"""Of a screenshot, so that the files stay small."""
PATIENCE_S = 90


def main(home: Path = HOME, model: str = DEFAULT_MODEL, out: Path = IMAGES) -> None:
    """Take the screenshots of the documents again.

    Args:
        home: where local runs are kept: one sweep at least.
        model: registered model whose champion is shown.
        out: folder of the images.
    """
    with exit_on_error("screenshots"):
        if not (CHROMIUM.exists() and DRIVER.exists()):
            sys.exit("error: chromium and its driver are needed (Debian: chromium chromium-driver)")
        client = local_or_named_server(home)
        run = tracking.find_run(client, f"{model}@champion")
        with tempfile.TemporaryDirectory() as directory, served(home) as server, browser() as page:
            tags = run.data.tags
            others = client.search_runs(
                [run.info.experiment_id],
                f"tags.subset_digest = '{tags['subset_digest']}' and tags.seed = '{tags['seed']}' "
                f"and tags.weights_digest != '{tags['weights_digest']}'",
            )
            champion = client.get_model_version_by_alias(model, "champion")
            name = "evaluation/report.html"
            report = Path(client.download_artifacts(run.info.run_id, name, directory)).resolve()
            shots = {
                "experiment": (
                    f"{server}/#/experiments/{run.info.experiment_id}/runs?viewStateShareKey=shike",
                    "test/accuracy",
                ),
                "model": (f"{server}/#/models/{model}/versions/{champion.version}", "How good"),
                "report": (report.as_uri(), "Accuracy in percent"),
            }
            if others:  # same images, same seed, another recipe
                compare([run.info.run_id, others[0].info.run_id], home, Path(directory))
                shots["compare"] = ((Path(directory) / "compare.html").as_uri(), "interval")
            else:
                print("no comparison: there is no run of another recipe on the same images")
            out.mkdir(parents=True, exist_ok=True)
            for name, (address, text) in shots.items():
                page.get(address)
                wait_for(page, text)
                tidy(page)
                save(page, out / f"{name}.png")
                print(f"{out / name}.png: {(out / f'{name}.png').stat().st_size // 1000} kB")


@contextmanager
def served(home: Path) -> Iterator[str]:
    """The address of a tracking server that shows the runs made here."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    store = f"sqlite:///{home.resolve()}/mlflow.db"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            deadline = time.monotonic() + PATIENCE_S
            while not answers(f"http://127.0.0.1:{port}/health"):
                if server.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise RuntimeError(log.read().decode().strip().splitlines()[-1])
                time.sleep(0.3)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(30)


def answers(url: str) -> bool:
    """Whether a server is there."""
    try:
        with urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@contextmanager
def browser() -> Iterator[webdriver.Chrome]:
    """A headless Chromium."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("headless", "no-sandbox", "disable-gpu", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--window-size=1600,950")
    started = webdriver.Chrome(options=options, service=Service(str(DRIVER)))
    try:
        yield started
    finally:
        started.quit()


def wait_for(page: webdriver.Chrome, text: str) -> None:
    """Wait until a page has shown a text, and settled."""
    deadline = time.monotonic() + PATIENCE_S
    while text not in page.find_element(By.TAG_NAME, "body").text:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{page.current_url} never showed {text!r}")
        time.sleep(0.3)
    time.sleep(3)  # what is drawn when all has been fetched


def tidy(page: webdriver.Chrome) -> None:
    """Close the assistant that MLflow opens, and show the runs below a sweep."""
    for selector in ("button[aria-label=Close]", "[row-index='0'] button"):
        for found in page.find_elements(By.CSS_SELECTOR, selector)[:1]:
            found.click()
            time.sleep(2)


def save(page: webdriver.Chrome, path: Path) -> None:
    """A small PNG of what is seen.

    Raises:
        RuntimeError: it is too large for the repository.
    """
    page.save_screenshot(str(path))
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    if (size := path.stat().st_size) > MOST_BYTES:
        raise RuntimeError(f"{path} has {size} bytes, more than {MOST_BYTES}")


if __name__ == "__main__":
    tyro.cli(main, prog="docs/screenshots.py")
