"""A Ray cluster as `ray start` makes one, and the training command run against it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from fbs_rl.training.settings import PretrainSettings

_START_S = 300
_AGENT_S = 240
PROJECT = Path(__file__).parents[1]


@dataclass(frozen=True, slots=True)
class LocalCluster:
    """environment: what a process needs in its environment to reach the cluster."""

    dashboard: str
    environment: dict[str, str]

    def submit(self, *command: str) -> subprocess.Popen[str]:
        """`ray job submit` of a command; its output is the job's."""
        arguments = [
            "job",
            "submit",
            "--address",
            self.dashboard,
            "--working-dir",
            str(PROJECT / "configs"),
            "--",
        ]
        return _spawn([str(Path(sys.executable).with_name("ray")), *arguments, *command], {})

    def command(self, *arguments: str, module: str = "fbs_rl.pretrain") -> subprocess.Popen[str]:
        """`python -m fbs_rl.pretrain` as a process of its own, with the cluster's address."""
        return _spawn([sys.executable, "-m", module, *arguments], self.environment)


@contextlib.contextmanager
def start_cluster(folder: Path, cpus: int = 3) -> Iterator[LocalCluster]:
    """`ray start --head --block`, ended by its own process id (`ray stop` would end every cluster here)."""
    gcs, dashboard, client, agent = free_ports(4)
    token = os.environ["RAY_AUTH_TOKEN"]  # of conftest.py
    # Ray's sockets live below this folder, and a socket's path is at most 107 characters long.
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as short:
        log = folder / "ray.log"
        options = [
            "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", "--disable-usage-stats",
            f"--ray-client-server-port={client}", f"--num-cpus={cpus}", f"--temp-dir={short}",
            # The agent that runs jobs listens on one port by default, which another cluster here may have.
            f"--dashboard-agent-listen-port={agent}",
            "--object-store-memory=100000000",
        ]  # fmt: skip
        with log.open("w") as file:
            process = subprocess.Popen(
                [str(Path(sys.executable).with_name("ray")), "start", *options],
                env=_environment({}), stdout=file, stderr=file,
            )  # fmt: skip
        try:
            url = f"http://127.0.0.1:{dashboard}"
            request = urllib.request.Request(
                f"{url}/api/version", headers={"Authorization": f"Bearer {token}"}
            )
            until(lambda: _answers(request), _START_S, f"no cluster; see {log}")
            yield LocalCluster(url, {"RAY_ADDRESS": f"127.0.0.1:{gcs}"})
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


def _answers(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request, timeout=2):
            return True
    except OSError:
        return False


def _environment(more: dict[str, str]) -> dict[str, str]:
    """The project is importable from anywhere, and `python` is the one that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(PROJECT), **more}


def _spawn(command: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        env=_environment(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))
        return [each.getsockname()[1] for each in sockets]


def until(condition: Callable[[], Any], limit_s: float, otherwise: str) -> Any:
    """What `condition` gives once it is true. Raises TimeoutError after `limit_s`."""
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        if found := condition():
            return found
        time.sleep(0.02)
    raise TimeoutError(otherwise)


# --- a run ------------------------------------------------------------------------------------------------


def write_config(folder: Path, settings: PretrainSettings) -> str:
    """A YAML file of `settings`."""
    from fbs_rl.config import to_tree  # late: actors of tests/test_gang.py import this module too

    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(to_tree(settings)))
    return str(path)


def records(run: Path) -> list[dict[str, Any]]:
    """Whole lines of the run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in lines]


def step_records(run: Path) -> dict[int, dict[str, Any]]:
    """By step done, the last record of each: a restart repeats some."""
    return {r["train/step"]: r for r in records(run) if "train/loss" in r}


def losses(run: Path) -> list[float]:
    found = step_records(run)
    return [found[step]["train/loss"] for step in sorted(found)]


def wait_for_step(
    run: Path, step: int, process: subprocess.Popen[str], limit_s: float = 600
) -> None:
    """Until `step` is logged; TimeoutError with the process's output if it ends or takes too long."""

    def reached() -> bool:
        return max(step_records(run), default=0) >= step

    until(
        lambda: reached() or process.poll() is not None,
        limit_s,
        f"{run} does not reach step {step}",
    )
    if not reached():
        raise TimeoutError(f"ended before step {step}: {process.communicate()[0]}")


def submitted(cluster: LocalCluster, *command: str, limit_s: float = 1200) -> tuple[int, str]:
    """(exit code, output) of a command run by `ray job submit`.

    A cluster that has only just started answers before the agent is there that runs jobs.
    """
    ends = time.monotonic() + _AGENT_S
    while True:
        code, output = finish(cluster.submit(*command), limit_s)
        if "No available agent" not in output or time.monotonic() > ends:
            return code, output
        time.sleep(3)


def finish(process: subprocess.Popen[str], limit_s: float = 900) -> tuple[int, str]:
    """(exit code, output) of a process, killed if it takes longer than `limit_s`."""
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise TimeoutError(f"not done within {limit_s} s: {output}") from None
    return process.returncode, output
