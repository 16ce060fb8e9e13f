from __future__ import annotations

from pathlib import Path

import pytest
import ray

from actors.prepare_worker import RayPool
from fbs_rl.data.prepare import prepare
from fbs_rl.data.prepare_config import read_config
from tests.data_corpus import result_digests, texts, tokenizer_folder, write_jsonl
from tests.dying_task import upper_or_die


def test_a_ray_cluster_makes_the_same_bytes(tmp_path: Path) -> None:
    """One real cluster for all of it: starting one takes seconds."""
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts("en", 12)])
    tokenizer = tokenizer_folder(tmp_path / "tokenizer")
    config = read_config(None, [f"tokenizer={tokenizer}", "sequence_tokens=64", "heldout_frac=0.2"])
    here = prepare(config, [path], tmp_path / "here", unit_bytes=20_000)
    pool = RayPool(1, "local")
    try:
        done = sorted((d.number, d.returned) for d in pool.run(upper_or_die, ["a", "b", "c"]))
        assert done == [(0, "A"), (1, "B"), (2, "C")]
        with pytest.raises(FileNotFoundError, match="there is no such thing"):
            list(pool.run(upper_or_die, ["a", "fail"]))
        there = prepare(config, [path], tmp_path / "there", on_ray=True, unit_bytes=20_000)
        assert ray.is_initialized()  # a cluster that was there before is left running
    finally:
        pool.close()
    assert not ray.is_initialized()
    assert result_digests(there.out) == result_digests(here.out)
