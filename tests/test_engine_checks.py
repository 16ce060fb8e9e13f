"""Engine options of FBS models, through vLLM's own EngineArgs; no engine is started for most of it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import LlamaConfig

from fbs_rl.serving.request_options import RequestOptions
from fbs_rl.serving.serving_settings import ServingSettings
from fbs_rl.serving.step_stats import FIELDS
from tests.served_tiny import make_folder

RUNNER = "VLLM_USE_V2_MODEL_RUNNER"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ "chunk": with a Chunk-Head; "plain": without; "backbone": no FBS model."""
    root = tmp_path_factory.mktemp("models")
    make_folder(root / "chunk")
    make_folder(root / "plain", chunk=False)
    backbone = LlamaConfig(
        hidden_size=64, num_attention_heads=2, num_hidden_layers=2, vocab_size=97,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    backbone.save_pretrained(root / "backbone")
    return root


# --- over there ---------------------------------------------------------------------------------------


def configured(folder: Path, **options: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    return EngineArgs(str(folder), skip_tokenizer_init=True, **options).create_engine_config()


def complaint(folder: Path, second: str | None = None, **options: Any) -> str | None:
    """What is said of these options; None if they are taken. second: RUNNER of the environment."""
    os.environ.pop(RUNNER, None)
    if second is not None:
        os.environ[RUNNER] = second
    try:
        configured(folder, **options)
    except ValueError as error:
        return str(error)
    finally:
        os.environ.pop(RUNNER, None)
    return None


def defaults(folder: Path, **options: Any) -> dict[str, Any]:
    os.environ.pop(RUNNER, None)
    made = configured(folder, **options)
    return {
        "worker": made.parallel_config.worker_cls,
        "extension": made.parallel_config.worker_extension_cls,
        "scheduler": made.scheduler_config.scheduler_cls,
        "async": made.scheduler_config.async_scheduling,
        "prefix": made.cache_config.enable_prefix_caching,
        "mode": made.compilation_config.mode.name,
        "graphs": made.compilation_config.cudagraph_mode.name,
        "cascade": not made.model_config.disable_cascade_attn,
        "processors": len(made.model_config.logits_processors or []),
        "second": made.use_v2_model_runner,
        "runner": os.environ.get(RUNNER),
    }


# --- refused ------------------------------------------------------------------------------------------

NGRAM = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"tensor_parallel_size": 2}, "tensor_parallel_size is 2, but an engine for an FBS model uses one device; start"),
    ({"pipeline_parallel_size": 2}, "pipeline_parallel_size is 2"),
    ({"prefill_context_parallel_size": 2}, "prefill_context_parallel_size is 2"),
    ({"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, "tensor_parallel_size is 2"),
    ({"data_parallel_size": 2}, "data_parallel_size is 2"),
    ({"speculative_config": NGRAM}, "speculative decoding cannot be used with an FBS model: gates decide token by"),
    ({"kv_transfer_config": CONNECTOR}, "a KV connector or KV offloading cannot"),
    ({"kv_offloading_size": 1.0}, "a KV connector or KV offloading cannot"),
    ({"enable_lora": True}, "LoRA cannot"),
    ({"enable_dbo": True}, "dual-batch overlap cannot"),
    ({"ubatch_size": 2}, "dual-batch overlap cannot"),
    ({"kv_cache_dtype": "fp8"}, "a quantised KV cache cannot"),
    ({"quantization": "compressed-tensors"}, "quantised weights cannot"),
    ({"hf_overrides": {"sliding_window": 64}}, "sliding-window attention cannot"),
    ({"hf_overrides": {"segment_position": True}}, "segment_position), which serving does not know"),
    ({"kv_sharing_fast_prefill": True}, "fast prefill of shared caches cannot"),
    ({"runner": "pooling"}, "pooling cannot"),
    ({"enable_prompt_embeds": True}, "prompts as embeddings cannot"),
    ({"async_scheduling": True}, "asynchronous scheduling cannot"),
    ({"second": "1"}, "VLLM_USE_V2_MODEL_RUNNER=1 cannot"),
    ({"watermark_config": {"algorithm": "gumbel", "key": 1}}, "(watermarking or HiSparse) asks for vLLM's second"),
    ({"worker_cls": "vllm.v1.worker.cpu_worker.CPUWorker"}, "worker_cls is vllm.v1.worker.cpu_worker.CPUWorker, but"),
    ({"worker_extension_cls": "collections.Counter"}, "worker_extension_cls is collections.Counter, but an FBS model"),
    ({"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "scheduler_cls is vllm.v1.core.sched.scheduler.Sch"),
    ({"enable_prefix_caching": True}, "enable_prefix_caching cannot be used with a model that has a Chunk-Head"),
    ({"additional_config": {"fbs": {"decode_path": "kernel"}}}, "decode_path is 'kernel', but vLLM runs on cpu here"),
    ({"additional_config": {"fbs": {"decode_pth": "x"}}}, "has no setting 'decode_pth'; did you mean 'decode_path'?"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "sentence"), REFUSED)
def test_what_cannot_work_is_refused_in_a_sentence(
    there: Callable[..., Any], folders: Path, options: dict[str, Any], sentence: str
) -> None:
    said = there(complaint, folders / "chunk", **options)
    assert said is not None and sentence in said


def test_derived_classes_and_plain_options_are_taken(
    there: Callable[..., Any], folders: Path
) -> None:
    for options in (
        {"worker_extension_cls": "fbs_rl.serving.runner.FBSWorkerExtension"},
        {"scheduler_cls": "fbs_rl.serving.scheduler.FBSScheduler"},
        {"async_scheduling": False, "enable_prefix_caching": False, "enforce_eager": True},
        {"kv_cache_dtype": "bfloat16", "data_parallel_size": 1},
    ):
        assert there(complaint, folders / "chunk", **options) is None
    assert there(complaint, folders / "plain", enable_prefix_caching=True) is None
    assert there(complaint, folders / "chunk", "0") is None


# --- set ----------------------------------------------------------------------------------------------


def test_defaults_are_those_that_skipping_needs(there: Callable[..., Any], folders: Path) -> None:
    wanted = {
        "worker": "fbs_rl.serving.worker.FBSWorker",
        "extension": "fbs_rl.serving.http_calls.FBSHttpExtension",
        "scheduler": "fbs_rl.serving.scheduler.FBSScheduler",
        "async": False,
        "prefix": False,
        "mode": "NONE",
        "graphs": "NONE",
        "cascade": False,
        "processors": 1,
        "second": False,
        "runner": "0",
    }
    assert there(defaults, folders / "chunk") == wanted
    compiled = {"mode": 3, "cudagraph_mode": "FULL"}
    assert there(defaults, folders / "chunk", compilation_config=compiled) == wanted
    assert there(defaults, folders / "plain") == {**wanted, "prefix": True}
    assert there(defaults, folders / "plain", enable_prefix_caching=False) == wanted


def test_engines_of_other_models_are_left_alone(there: Callable[..., Any], folders: Path) -> None:
    plain = there(defaults, folders / "backbone")
    assert plain["runner"] is None and plain["processors"] == 0
    assert plain["worker"].startswith("vllm.") and plain["scheduler"] is None
    assert plain["prefix"] and plain["mode"] != "NONE"


def after_another_engine(folder: Path) -> tuple[bool, str | None]:
    """vLLM keeps its environment variables once an engine of this process runs."""
    from vllm import envs

    os.environ.pop(RUNNER, None)
    envs.enable_envs_cache()
    try:
        made = configured(folder)
        return made.use_v2_model_runner, os.environ.get(RUNNER)
    finally:
        envs.disable_envs_cache()
        os.environ.pop(RUNNER, None)


def test_the_runner_is_chosen_even_where_vllm_keeps_its_environment(
    there: Callable[..., Any], folders: Path
) -> None:
    assert there(after_another_engine, folders / "chunk") == (False, "0")


# --- files of counters --------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, Any]:
    """Two configurations made from one EngineArgs, then gone."""
    from prometheus_client import REGISTRY, generate_latest
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(str(folder), skip_tokenizer_init=True)
    held = [arguments.create_engine_config(), arguments.create_engine_config()]
    settings: list[Any] = [made.additional_config for made in held]
    paths = [Path(given["fbs"]["stats_file"]) for given in settings]
    there_first = [path.exists() for path in paths]
    held.clear()
    gc.collect()
    shown = generate_latest(REGISTRY).decode()
    return {
        "distinct": paths[0] != paths[1],
        "first": there_first,
        "after": [path.exists() for path in paths],
        "fallbacks": "fbs:fallbacks_total 0.0" in shown,
        "again": complaint(folder),
    }


def test_files_of_counters_go_with_their_configuration(
    there: Callable[..., Any], folders: Path
) -> None:
    found = there(files_of, folders / "chunk")
    assert found["distinct"] and found["first"] == [True, True] and found["after"] == [False, False]
    assert found["fallbacks"] and found["again"] is None


def swept(folder: Path, scratch: Path) -> set[str]:
    """What is left in a folder of such files once another engine is configured."""
    import tempfile

    dead, alive = 2**30, os.getpid()
    for owner, idle_s in ((dead, 7200), (dead + 1, 60), (alive, 7200)):
        path = scratch / f"fbs_stats_{owner}_x"
        path.touch()
        written_s = path.stat().st_mtime - idle_s
        os.utime(path, times=(written_s, written_s))
    before, tempfile.tempdir = tempfile.tempdir, str(scratch)
    try:
        configured(folder)
    finally:
        tempfile.tempdir = before
    gc.collect()
    return {path.name.replace(str(alive), "alive") for path in scratch.iterdir()}


def test_files_of_killed_processes_are_swept(
    there: Callable[..., Any], folders: Path, tmp_path: Path
) -> None:
    left = there(swept, folders / "chunk", tmp_path)
    assert left == {"fbs_stats_alive_x", f"fbs_stats_{2**30 + 1}_x"}


def of_several_servers(folder: Path, scratch: Path) -> dict[str, Any]:
    """What the process that starts two API servers does, then one of these."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(scratch)
    from prometheus_client import generate_latest
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.metrics import prometheus

    from fbs_rl.serving.step_stats import StepStats

    def of_rank(rank: int) -> Any:
        arguments = EngineArgs(str(folder), skip_tokenizer_init=True)
        arguments._api_process_count, arguments._api_process_rank = 2, rank
        return arguments.create_engine_config()

    try:
        held = [of_rank(rank) for rank in (-1, 0, 1)]
        paths = {made.additional_config["fbs"]["stats_file"] for made in held}
        StepStats.create(next(iter(paths))).add(decode_tokens=3)
        shown = generate_latest(prometheus.get_prometheus_registry()).decode()
    finally:
        del os.environ["PROMETHEUS_MULTIPROC_DIR"], os.environ["FBS_STATS_FILE"]
    return {"paths": len(paths), "shown": 'fbs:decode_tokens_total{engine="0"} 3.0' in shown}


def test_several_api_servers_show_the_one_engine(
    there: Callable[..., Any], folders: Path, tmp_path: Path
) -> None:
    found = there(of_several_servers, folders / "chunk", tmp_path)
    assert found == {"paths": 1, "shown": True}


def steps_ahead(path: str, wished: bool | None, scheduler: str | None) -> bool:
    """Whether an engine with these options prepares a step while the one in front runs."""
    from fbs_rl.serving.engine_checks import _may_be_ahead

    return _may_be_ahead(
        SimpleNamespace(
            additional_config={"fbs": {"decode_path": path}},
            scheduler_config=SimpleNamespace(async_scheduling=wished, scheduler_cls=scheduler),
        )
    )


def test_only_kernels_let_a_step_be_prepared_ahead(there: Callable[..., Any]) -> None:
    """Unless somebody asks for the opposite, or brings a scheduler that cannot."""
    plain, ahead = (f"fbs_rl.serving.scheduler.FBS{name}Scheduler" for name in ("", "Async"))
    assert [there(steps_ahead, "kernel", wish, None) for wish in (None, True, False)] == [
        True, True, False,
    ]  # fmt: skip
    assert [there(steps_ahead, "kernel", None, own) for own in (plain, ahead)] == [False, True]
    assert not any(there(steps_ahead, path, None, None) for path in ("compact", "masked"))


# --- documentation ------------------------------------------------------------------------------------


def test_the_documentation_names_every_option_and_setting() -> None:
    text = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()
    settings = [field.name for field in fields(ServingSettings)]
    for name in (*RequestOptions.names(), *settings, *(f"fbs:{stat.name}" for stat in FIELDS)):
        assert f"`{name}" in text, name
