from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.decode_bench import FORMATS, Bench
from tests.decode_launchers import PLACES

if TYPE_CHECKING:
    from tests.ray_cluster import LocalCluster

# Ray reads these when it is imported: one token for every cluster and driver of this test session.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The models of the tests are tiny: threads that wait for each other cost ten times what they bring.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start engines and clusters go first: they take longest, and short ones fill up the end."""
    starts = {"there", "ray_cluster"}
    long = {item.path for item in items if starts & set(getattr(item, "fixturenames", ()))}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(params=FORMATS, ids=["float32", "bfloat16"])
def number_format(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=PLACES)
def bench(request: pytest.FixtureRequest, number_format: torch.dtype) -> Bench:
    """A place and a number format in which calls of the graph decoder are tried."""
    return Bench(request.param, number_format)


@pytest.fixture(scope="session")
def training_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny backbone and shards, as tests.tiny_training.settings wants them."""
    from tests.tiny_training import make_backbone, make_shards

    root = tmp_path_factory.mktemp("training")
    make_backbone(root / "backbone")
    make_shards(root / "shards")
    return root


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """A Ray cluster of this machine that takes jobs; no process is connected to it yet."""
    from tests.ray_cluster import start_cluster

    with start_cluster(tmp_path_factory.mktemp("ray")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders with models and gates that read and write text, by what is special about them."""
    from tests.text_models import make_places

    return make_places(tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("large"))


@pytest.fixture(scope="module")
def there() -> Iterator[Callable[..., Any]]:
    """Calls functions in a process of their own, which may hold a vLLM engine."""
    from tests.engine_process import engine_process

    with engine_process() as run:
        yield run
