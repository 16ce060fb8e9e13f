"""Near-duplicates against the exact Jaccard similarity of shingle sets, made of strings."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fbs_rl.data.near_duplicates import (
    Clusters,
    band_keys,
    band_rows,
    join_similar,
    signatures,
)
from fbs_rl.data.planted_duplicates import edited, judge, shingle_set
from fbs_rl.data.planted_duplicates import jaccard as set_jaccard
from fbs_rl.data.prepare import prepare
from fbs_rl.data.prepare_config import NearDuplicateConfig, read_config
from fbs_rl.data.selection import first_copies
from fbs_rl.data.shingles import ngram_hashes, unit_hashes
from tests.data_corpus import texts, tokenizer_folder, write_jsonl

THRESHOLD = 0.8


def jaccard(one: str, other: str) -> float:
    return set_jaccard(shingle_set(one, 5), shingle_set(other, 5))


def planted(lang: str) -> list[str]:
    """Real documents, each followed by versions with few to many edits."""
    chance = random.Random(0)
    made = []
    for text in texts(lang, 25):
        made.append(text[:1500])
        made += [edited(text[:1500], rate, chance) for rate in (0.004, 0.01, 0.02, 0.05, 0.2)]
    return made


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_hashed_shingles_are_as_different_as_the_shingles(lang: str) -> None:
    for text in texts(lang, 10):
        hashes = ngram_hashes(unit_hashes(text), 5)
        assert len(set(hashes.tolist())) == len(shingle_set(text, 5))


def test_case_punctuation_and_space_do_not_count() -> None:
    one = unit_hashes("The quick, brown FOX — jumps_over 12 dogs: 读书。")
    other = unit_hashes("the\nquick brown fox jumps over 12 dogs读 书")
    assert (one == other).all() and len(one) == 10
    assert len(set(unit_hashes("abc acb bac bca cab cba ab a").tolist())) == 8


def test_a_text_in_pieces_has_the_units_of_its_parts() -> None:
    text = "word " * 300_000  # longer than a piece
    units = unit_hashes(text)
    assert len(units) in (300_000, 300_001, 300_002) and len(set(units.tolist())) <= 5
    assert unit_hashes("—。 !").tolist() == [] and unit_hashes("").tolist() == []


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_estimates_are_near_the_exact_similarity(lang: str) -> None:
    documents = planted(lang)[:60]
    sketches = signatures([ngram_hashes(unit_hashes(t), 5) for t in documents], 512)
    errors = []
    for a, b in itertools.combinations(range(60), 2):
        exact = jaccard(documents[a], documents[b])
        if exact > 0.3:
            errors.append(float((sketches[a] == sketches[b]).mean()) - exact)
    assert len(errors) > 80
    assert abs(np.mean(errors)) < 0.005 and np.std(errors) < 0.5 / 512**0.5


def test_bands_let_pairs_at_the_threshold_meet() -> None:
    for threshold, permutations in itertools.product((0.5, 0.8, 0.95), (64, 128, 256)):
        rows = band_rows(threshold, permutations)
        met = 1 - (1 - threshold**rows) ** (permutations // rows)
        assert met >= 0.99
    assert band_rows(0.8, 128) == 6


def removed_by(documents: list[str], threshold: float) -> set[int]:
    sketches = signatures([ngram_hashes(unit_hashes(t), 5) for t in documents], 128)
    clusters = Clusters(len(documents))
    numbers = np.arange(len(documents))
    for keys in band_keys(sketches, threshold):
        join_similar(
            clusters,
            keys,
            numbers,
            lambda a, b: (sketches[a] == sketches[b]).mean(axis=1),
            threshold,
        )
    return set(np.flatnonzero(clusters.first_of(numbers) != numbers).tolist())


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_recall_and_precision_on_planted_duplicates(lang: str) -> None:
    documents = planted(lang)
    removed = removed_by(documents, THRESHOLD)
    nearest = [
        max((jaccard(documents[k], documents[j]) for j in range(k - k % 6, k)), default=0.0)
        for k in range(len(documents))
    ]
    # The estimate's standard error at 0.8 is 0.035: two of them on either side are not judged.
    clear = {k for k, similarity in enumerate(nearest) if similarity >= THRESHOLD + 0.07}
    different = {k for k, similarity in enumerate(nearest) if similarity <= THRESHOLD - 0.07}
    assert len(clear) > 30 and len(different) > 50
    assert len(clear & removed) / len(clear) >= 0.97
    assert len(different & removed) / len(different) <= 0.02


def test_many_alike_are_one_cluster_and_the_first_stays() -> None:
    chance = random.Random(1)
    documents = [edited(texts("en", 1)[0], 0.003, chance) for _ in range(300)]
    assert removed_by(documents, 0.7) == set(range(1, 300))


def test_documents_that_share_a_band_only_are_kept() -> None:
    """A bucket of documents that are not alike: leaders take turns until none is left."""
    chance = random.Random(2)
    documents = [edited(texts("en", 1)[0], 0.12, chance) for _ in range(60)]
    pairs = itertools.combinations(documents[:20], 2)
    assert 0.2 < max(jaccard(a, b) for a, b in pairs) < 0.6
    assert removed_by(documents, THRESHOLD) == set()


def test_clusters_keep_the_first_in_input_order() -> None:
    clusters = Clusters(8)
    for one, other in ((6, 7), (5, 6), (3, 4), (7, 2)):
        clusters.join(one, other)
    assert clusters.first_of(np.arange(8)).tolist() == [0, 1, 2, 3, 3, 2, 2, 2]


def test_first_copies() -> None:
    digests = np.array([[5, 1], [2, 2], [5, 1], [5, 0], [2, 2], [5, 1]], np.uint64)
    assert first_copies(digests).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_copies(digests[:0]).tolist() == []


def test_duplicates_are_found_across_all_inputs(tmp_path: Path) -> None:
    chance = random.Random(3)
    originals = texts("en", 8)
    a = write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in originals[:6]])
    later = [
        originals[2] + " \n",
        edited(originals[4], 0.004, chance),
        *originals[6:],
        originals[7],
    ]
    b = write_jsonl(tmp_path / "b.jsonl", [{"text": t} for t in later])
    c = write_jsonl(tmp_path / "c.jsonl", [{"text": t} for t in ("!!! " * 100, "??? " * 100)])
    config = read_config(
        None, [f"tokenizer={tokenizer_folder(tmp_path / 'tokenizer')}", "sequence_tokens=64"]
    )
    made = prepare(config, [a, b, c], tmp_path / "out", unit_bytes=5000)
    record: Any = made.manifest.record
    assert record["removed"]["exact duplicate"]["documents"] == 2
    assert record["removed"]["near duplicate"]["documents"] == 1
    exact, near = (record["removed_examples"][f"{kind} duplicate"] for kind in ("exact", "near"))
    assert [(e["row"], e["because_of"]) for e in exact] == [
        (f"{b}:1", f"{a}:3"),
        (f"{b}:5", f"{b}:4"),
    ]
    assert [(e["row"], e["because_of"]) for e in near] == [(f"{b}:2", f"{a}:5")]
    assert record["kept"]["documents"] == 10

    only_exact = read_config(
        None,
        [f"tokenizer={config.tokenizer}", "sequence_tokens=64", "near_duplicates.threshold=null"],
    )
    made = prepare(only_exact, [a, b, c], tmp_path / "exact")
    assert made.manifest.record["kept"] == {
        "documents": 11,
        "bytes": record["kept"]["bytes"] + len(later[1].strip().encode()),
    }


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_benchmark_judges_by_exact_similarity(lang: str) -> None:
    made = judge(lang, texts(lang, 30), NearDuplicateConfig())
    assert made.recall > 0.9 and made.precision > 0.9
    assert made.clear_recall > 0.97 and made.clear_precision > 0.97
    similarities = [rate.similarity for rate in made.rates]
    assert similarities == sorted(similarities, reverse=True) and similarities[0] > 0.97
    assert made.rates[0].removed == 30 and made.rates[-1].removed < 5
