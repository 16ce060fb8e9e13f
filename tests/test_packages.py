"""The eight packages that the project stands on are installed and work together in one process."""

from __future__ import annotations

import importlib

import pytest

PACKAGES = ("ray", "torch", "deepspeed", "transformers", "vllm", "pkuseg", "gymnasium", "wandb")


@pytest.mark.parametrize("name", PACKAGES)
def test_the_package_is_there(name: str) -> None:
    assert importlib.import_module(name).__name__ == name


def test_pkuseg_segments_with_the_model_it_ships() -> None:
    words = importlib.import_module("pkuseg").pkuseg().cut("人们读书的时候会跳过一些词。")
    assert "".join(words) == "人们读书的时候会跳过一些词。" and "时候" in words
