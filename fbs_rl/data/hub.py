"""Data sets of the Hugging Face hub as local files: hf:OWNER/NAME or hf:OWNER/NAME/PATTERN.

The files that the data set's owner uploaded are read if they are of a known format; otherwise the Parquet
copy that the hub makes of every public data set. So no loading script is ever run, and nothing but
huggingface_hub, which transformers needs anyway, is imported.
"""

from __future__ import annotations

import os
from fnmatch import fnmatch
from typing import Any

from fbs_rl.data.readers import format_of

PREFIX = "hf:"
ANSWER_WITHIN_S = 5.0
"""How long the hub may take to answer the first question before it counts as unreachable."""
_PARQUET_COPY = "refs/convert/parquet"


def download(word: str) -> list[tuple[str, str]]:
    """(path in the hub's cache, name for the manifest) of every file that `word` means, downloaded.

    Raises OSError in one sentence when the hub cannot be reached or has no such data set, FileNotFoundError
    when it holds nothing readable or nothing that matches.
    """
    owner, _, rest = word.removeprefix(PREFIX).partition("/")
    name, _, pattern = rest.partition("/")
    if not owner or not name:
        raise ValueError(f"{word} names no data set; write {PREFIX}OWNER/NAME")
    repository = f"{owner}/{name}"
    from huggingface_hub import HfApi, hf_hub_download

    api = HfApi()
    for revision in ("main", _PARQUET_COPY):
        commit, files = _listing(api, repository, revision)
        chosen = _choose(files, pattern)
        if chosen:
            break
    else:
        wanted = f" that matches {pattern}" if pattern else ""
        raise FileNotFoundError(
            f"the data set {repository} holds no file of a known format{wanted}"
        )
    return [
        (
            hf_hub_download(repository, file, repo_type="dataset", revision=commit),
            f"{PREFIX}{repository}@{commit}/{file}",
        )
        for file in chosen
    ]


def _listing(api: Any, repository: str, revision: str) -> tuple[str, list[str]]:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        raise OSError(
            f"{PREFIX}{repository} needs the Hugging Face hub, but HF_HUB_OFFLINE is set; "
            f"unset it or give local files"
        )
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = api.dataset_info(repository, revision=revision, timeout=ANSWER_WITHIN_S)
    except HfHubHTTPError as error:
        if revision == _PARQUET_COPY:
            return "", []  # the hub makes no such copy of some data sets
        raise OSError(
            f"the hub has no data set {repository} that can be read without logging in "
            f"({str(error).splitlines()[0]})"
        ) from error
    except (
        Exception
    ) as error:  # whatever the HTTP library of the day raises when there is no network
        raise OSError(
            f"{PREFIX}{repository} needs the Hugging Face hub, which cannot be reached from here "
            f"({type(error).__name__}); give local files"
        ) from error
    return found.sha, [sibling.rfilename for sibling in found.siblings or []]


def _choose(files: list[str], pattern: str) -> list[str]:
    """Files of a known format: those that match, or without a pattern the training split if it has a name."""
    readable = sorted(file for file in files if _known(file))
    if pattern:
        return [file for file in readable if fnmatch(file, pattern)]
    return [file for file in readable if "train" in file] or readable


def _known(file: str) -> bool:
    if "/" not in file and file.lower().endswith((".md", ".txt", ".json")):
        return False  # the card, the licence, dataset_infos.json
    try:
        format_of(file)
    except ValueError:
        return False
    return True
