from __future__ import annotations

from importlib.resources import files

import pytest

from fbs_rl.data.samples import LANGUAGES, SPLITS, SampleDocument, load_sample

MAX_FILE_BYTES = 500_000
WINDOW_CHARS = 200
PERMISSIVE_LICENCES = {"Public domain", "CC0-1.0", "MIT", "Apache-2.0"}


def documents(lang: str) -> list[SampleDocument]:
    return [document for split in SPLITS for document in load_sample(lang, split)]


def windows(text: str) -> set[str]:
    return {text[i : i + WINDOW_CHARS] for i in range(len(text) - WINDOW_CHARS + 1)}


def han_frac(text: str) -> float:
    letters = [c for c in text if c.isalpha()]
    return sum("\u4e00" <= c <= "\u9fff" for c in letters) / len(letters)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_language_has_both_splits(lang: str, split: str) -> None:
    sample = load_sample(lang, split)
    assert len(sample) >= 10
    assert {document.split for document in sample} == {split}
    assert {document.lang for document in sample} == {lang}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_sizes_are_bounded(lang: str) -> None:
    path = files("fbs_rl.data") / "samples" / f"{lang}.jsonl"
    assert 200_000 < len(path.read_bytes()) < MAX_FILE_BYTES
    assert all(1500 <= len(document.text) <= 6000 for document in documents(lang))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_train_is_about_sixty_per_cent_of_the_bytes(lang: str) -> None:
    n_bytes = {s: sum(len(d.text.encode()) for d in load_sample(lang, s)) for s in SPLITS}
    assert 0.55 < n_bytes["train"] / sum(n_bytes.values()) < 0.65


@pytest.mark.parametrize("lang", LANGUAGES)
def test_splits_share_no_text(lang: str) -> None:
    heldout = set().union(*(windows(d.text) for d in load_sample(lang, "heldout")))
    train = set().union(*(windows(d.text) for d in load_sample(lang, "train")))
    assert heldout.isdisjoint(train)


@pytest.mark.parametrize("lang", LANGUAGES)
def test_no_document_is_on_both_sides_or_listed_twice(lang: str) -> None:
    names = [(document.source, document.title) for document in documents(lang)]
    assert len(names) == len(set(names))


def test_chinese_documents_are_mostly_han() -> None:
    assert all(han_frac(document.text) > 0.5 for document in documents("zh"))
    assert all(han_frac(document.text) == 0.0 for document in documents("en"))


@pytest.mark.parametrize("lang", LANGUAGES)
def test_text_carries_no_markup(lang: str) -> None:
    for document in documents(lang):
        assert document.text == document.text.strip()
        assert "**" not in document.text and "[[" not in document.text
        assert "\ufffd" not in document.text and "\t" not in document.text


@pytest.mark.parametrize("lang", LANGUAGES)
def test_every_licence_permits_redistribution_and_is_explained(lang: str) -> None:
    notices = (files("fbs_rl.data") / "samples" / "LICENCES.md").read_text(encoding="utf-8")
    for document in documents(lang):
        assert document.licence in PERMISSIVE_LICENCES
        assert document.source in notices


def test_unknown_language_is_refused() -> None:
    with pytest.raises(ValueError, match="lang must be one of en, zh; got 'fr'"):
        load_sample("fr", "train")


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split must be one of train, heldout; got 'test'"):
        load_sample("en", "test")
