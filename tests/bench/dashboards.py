"""Every panel of every dashboard under load: does each of its expressions return data?

    python tests/bench/dashboards.py

Starts the service with the bundled model and a Prometheus server with the repository's
configuration, on free ports and scraping every second, puts a load on the service with `saccade
bench serve`, and asks Prometheus what Grafana would. Exits with 1 when an expression returns
nothing or only NaN, a rule is not loaded or does not evaluate, or the service is not scraped. What
it started it stops.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.deploy.monitoring import (  # noqa: E402
    PROMETHEUS,
    ask,
    expressions,
    filled_in,
    program,
    rules_not_loaded,
    targets_down,
)
from tests.ports import free_port  # noqa: E402

if TYPE_CHECKING:
    from collections.abc import Iterator

SCRAPE = 1
"""Seconds between scrapes: minutes of dashboards pass in a run of seconds."""
INTERVAL = "20s"
"""Of $__rate_interval."""
SETTLE = 75
"""Seconds after the load in which the slowest rules, evaluated every minute, must have values."""


@contextlib.contextmanager
def started(command: list[str], ready: str, seconds: float) -> Iterator[None]:
    """A process that answers `ready` with 200; stopped at the end."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(ready).status_code == 200:
                    break
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(command[:4])} did not start")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def configured(folder: Path, target: str) -> Path:
    """The repository's configuration for one target, scraped more often; rules as they are."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": f"{SCRAPE}s", "evaluation_interval": f"{SCRAPE}s"}
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    shutil.copytree(PROMETHEUS / "rules", folder / "rules")
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(config))
    return file


def load(url: str, seconds: int) -> None:
    """What moves every series: short and long prompts, each policy, a chat."""
    base = [sys.executable, "-m", "service.cli", "bench", "serve", "--url", url, "--warmup", "0"]
    runs = [
        [f"--duration={seconds}", "--rate=0.5", "--prompt=uniform:2200,4000", "--output=48"],
        ["--users=4", "--requests=8", "--prompt=300", "--output=24", "--endpoint=chat"],
        # Enough decode steps for a second audit, which is every 256.
        ["--users=2", "--requests=4", "--prompt=2500", "--output=150"],
        # Prompts attend sparsely only from 16,384 tokens on.
        ["--users=1", "--requests=1", "--prompt=20000", "--output=8"],
        *(
            ["--users=2", "--requests=4", "--prompt=2500", "--output=8", f"--sparsity={policy}"]
            for policy in ('{"policy": "dense"}', '{"policy": "fixed"}', '{"min_coverage": 1}')
        ),
    ]
    for run in runs:
        subprocess.run(
            [*base, *run], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
        )


def finite(prometheus: str, expression: str, since: float) -> bool:
    """Whether an expression had a number at any time since."""
    now = time.time()
    data = ask(prometheus, "query_range", query=expression, start=since, end=now, step=5)
    return any(
        math.isfinite(float(value)) for series in data["result"] for _, value in series["values"]
    )


def problems(prometheus: str, since: float) -> list[str]:
    """What does not hold."""
    found = targets_down(prometheus) + rules_not_loaded(prometheus)
    for file, title, expression in expressions():
        if not finite(prometheus, filled_in(expression, INTERVAL), since):
            found.append(f"no data: {file}, {title}: {expression}")
    return found


def main() -> int:
    """Run it; 0 when everything holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=40, help="of the longest part of the load")
    given = parser.parse_args()
    server = program("prometheus")
    if server is None:
        print("prometheus is missing: run make build/prometheus")
        # Where it cannot be had, nothing is known of the dashboards; in CI that is a failure.
        return 1 if os.environ.get("CI") else 0
    service, prometheus = free_port(), free_port()
    url, base = f"http://127.0.0.1:{service}", f"http://127.0.0.1:{prometheus}"
    serve = [sys.executable, "-m", "service.cli", "serve", "--standalone", f"--port={service}"]
    with tempfile.TemporaryDirectory() as folder:
        file = configured(Path(folder), f"127.0.0.1:{service}")
        monitor = [
            server,
            f"--config.file={file}",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{prometheus}",
        ]
        with (
            started([*serve, "--kv-cache-gib=1"], f"{url}/health", 180),
            started(monitor, f"{base}/-/ready", 60),
        ):
            since = time.time()
            time.sleep(2 * SCRAPE)  # the series at zero, from which what comes is an increase
            load(url, given.seconds)
            deadline = time.monotonic() + SETTLE
            while (found := problems(base, since)) and time.monotonic() < deadline:
                time.sleep(5)
    print("\n".join(found) or f"all {len(expressions())} expressions return data")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
