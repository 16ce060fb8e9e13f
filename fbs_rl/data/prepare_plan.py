"""Everything that is known before the first row is processed, and every mistake that can be seen by then."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fbs_rl.data.decontamination import BenchmarkIndex, benchmark_files
from fbs_rl.data.document_encoder import DocumentEncoder
from fbs_rl.data.encoding import labeller_of
from fbs_rl.data.idioms import load_lexicon
from fbs_rl.data.inputs import (
    UNIT_BYTES,
    InputFile,
    Unit,
    find_inputs,
    fingerprint,
    plan_units,
    sample_text,
)
from fbs_rl.data.near_duplicates import ALGORITHM
from fbs_rl.data.prepare_config import PrepareConfig, flat
from fbs_rl.data.readers import Format, expansion, format_of
from fbs_rl.data.shards import id_dtype
from fbs_rl.data.work_folder import Identity

PIPELINE = 1
"""Raised when the same configuration and input give other bytes than before."""
_SAMPLED_FILES, _SAMPLE_CHARS = 8, 2**16


@dataclass(frozen=True, slots=True)
class PreparePlan:
    """A checked configuration and its inputs."""

    config: PrepareConfig
    files: tuple[InputFile, ...]
    units: tuple[Unit, ...]
    unit_bytes: int
    encoder: DocumentEncoder
    benchmarks: BenchmarkIndex | None
    identity: Identity


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a preparation will need, before any filter: an upper bound but for the sampling error."""

    text_bytes: int
    tokens: int
    sequences: int
    shard_bytes: int
    work_bytes: int


def make_plan(
    config: PrepareConfig, inputs: Sequence[str], out: str | Path, unit_bytes: int = UNIT_BYTES
) -> PreparePlan:
    """The plan, in which nothing below the folder `out` is an input.

    Raises FileNotFoundError, ValueError or OSError, in one sentence, for what cannot work.
    """
    config.validate()
    files = find_inputs(inputs, config.rows, Path(out))
    if config.labels.lexicon is not None:
        load_lexicon(config.labels.lexicon)
    encoder = DocumentEncoder.of(read_tokenizer(config.tokenizer), labeller_of(config.labels))
    benchmarks = (
        BenchmarkIndex.read(config.decontamination) if config.decontamination.files else None
    )
    return PreparePlan(
        config=config,
        files=tuple(files),
        units=tuple(plan_units(files, unit_bytes)),
        unit_bytes=unit_bytes,
        encoder=encoder,
        benchmarks=benchmarks,
        identity=_identity(config, files, encoder),
    )


def read_tokenizer(name: str) -> Any:
    """The tokenizer that `name` means; OSError in one sentence if there is none."""
    from transformers import AutoTokenizer

    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return AutoTokenizer.from_pretrained(folder)
        # Imports the model classes, which takes seconds.
        from fbs_rl.model.backbone import ModelSource

        source = ModelSource.parse_tokenizer(name)
        return AutoTokenizer.from_pretrained(source.name, gguf_file=source.gguf_file)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{name}: no tokenizer could be read there ({reason}); name one with --tokenizer"
        ) from error


def _identity(
    config: PrepareConfig, files: Sequence[InputFile], encoder: DocumentEncoder
) -> Identity:
    settings = dict(flat(config))
    settings["tokenizer"] = encoder.digest
    settings["decontamination.files"] = [
        fingerprint(path) for path in benchmark_files(config.decontamination)
    ]
    if config.labels.lexicon is not None:
        settings["labels.lexicon"] = fingerprint(config.labels.lexicon)
    settings["versions"] = {
        "pipeline": PIPELINE,
        "minhash": ALGORITHM,
        "pkuseg": version("pkuseg"),
        "tokenizers": version("tokenizers"),
    }
    return Identity(settings, tuple((file.name, file.bytes, file.fingerprint) for file in files))


def estimate(plan: PreparePlan) -> Estimate:
    """From a sample of each of up to eight files."""
    files, config = plan.files, plan.config
    step = max(1, len(files) // _SAMPLED_FILES)
    sampled_bytes = sampled_tokens = 0
    for file in files[::step]:
        text = sample_text(file, config.rows, _SAMPLE_CHARS)
        sampled_bytes += len(text.encode())
        sampled_tokens += plan.encoder.count_tokens(text)
    text_bytes = sum(int(file.bytes * _gain(file.path)) for file in files)
    tokens = int(text_bytes * sampled_tokens / max(1, sampled_bytes))
    id_bytes = id_dtype(plan.encoder.vocabulary).itemsize
    bytes_a_token = id_bytes + 1
    return Estimate(
        text_bytes=text_bytes,
        tokens=tokens,
        sequences=-(-tokens // config.sequence_tokens),
        shard_bytes=tokens * bytes_a_token,
        # Texts, signatures of documents of some 4 kB, streams with clause numbers.
        work_bytes=int(text_bytes * 1.2) + tokens * (bytes_a_token + 4),
    )


def _gain(path: str) -> float:
    """Bytes of a file's content for each of its bytes."""
    kind, compression = format_of(path)
    if kind is Format.PARQUET:
        import pyarrow.parquet as parquet

        metadata = parquet.read_metadata(path)
        groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
        return sum(group.total_byte_size for group in groups) / max(1, Path(path).stat().st_size)
    return expansion(path, compression)
