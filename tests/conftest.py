from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tests.ray_cluster import LocalCluster

# Ray reads these when it is imported: one token for every cluster and driver of this test session.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(16))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# The models of the tests are tiny: threads that wait for each other cost ten times what they bring.
torch.set_num_threads(1)


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
