"""What a run will take, as a table: batch arithmetic, phases, FLOPs, hours, memory, bytes."""

from __future__ import annotations

import torch

from fbs_rl.data.shards import PackedShards
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.training.costs import (
    PEAK_FLOPS,
    checkpoint_bytes,
    estimate_memory,
    training_flops_per_token,
)
from fbs_rl.training.parameters import is_sharded, parameter_kinds, set_trained
from fbs_rl.training.settings import PretrainSettings

_ASSUMED = ("H100", 0.4)
"""Device and model-FLOPs utilisation that the estimated hours assume."""
_TEACHER_SHARE = 1 / 3  # a forward pass beside one forward and backward


def plan_table(settings: PretrainSettings, config: FBSConfig, rows: PackedShards) -> str:
    """A few aligned lines; no weights are read."""
    with torch.device("meta"):
        model = FBSForCausalLM(config)
    lines = _work_lines(settings, config, rows, model) + _size_lines(settings, config, rows, model)
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _work_lines(
    settings: PretrainSettings, config: FBSConfig, rows: PackedShards, model: FBSForCausalLM
) -> list[tuple[str, str]]:
    """What is trained on what, in which steps, and how much work that is."""
    batch, cluster, phases = settings.batch, settings.cluster, settings.phases
    kinds = parameter_kinds(model)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    new = sum(size for name, size in sizes.items() if kinds[name] != "backbone")
    step_tokens = batch.step_sequences * rows.sequence_tokens
    tokens = step_tokens * phases.steps
    epochs = batch.step_sequences * phases.steps / len(rows)
    observed, gated = phases.observed_steps, phases.steps - phases.observed_steps
    flops = training_flops_per_token(config, rows.sequence_tokens)
    taught = _TEACHER_SHARE * gated / phases.steps * (config.loss_distill > 0)
    total = flops * tokens * (1 + taught)
    device, utilisation = _ASSUMED
    hours = total / (PEAK_FLOPS[device] * utilisation) / 3600 / cluster.ranks
    return [
        (
            "model",
            f"{settings.model.backbone}, preset {settings.model.preset}: "
            f"{sum(sizes.values()) / 1e6:.1f} M parameters, {new / 1e6:.1f} M of them FBS's",
        ),
        ("data", f"{len(rows):,} sequences of {rows.sequence_tokens} tokens; {epochs:.2f} epochs"),
        (
            "step",
            f"{batch.step_sequences} sequences = {cluster.ranks} ranks x {batch.accumulation(cluster.ranks)} "
            f"accumulated x {batch.micro_sequences} at once = {step_tokens:,} tokens",
        ),
        ("phases", f"{observed} steps of 1a, {gated} of 1b; {tokens:,} tokens in all"),
        (
            "FLOPs",
            f"{flops / 1e9:.3g} G a token, {total:.3g} in all (backbone, and the teacher's passes in 1b)",
        ),
        ("time", f"{hours:.2g} h on {cluster.ranks} {device} at {utilisation:.0%} utilisation"),
    ]


def _size_lines(
    settings: PretrainSettings, config: FBSConfig, rows: PackedShards, model: FBSForCausalLM
) -> list[tuple[str, str]]:
    """What a rank holds in memory, and what a checkpoint on disk."""
    cluster, kept = settings.cluster, settings.checkpoint
    parameters = sum(parameter.numel() for parameter in model.parameters())
    matrices = sum(p.numel() for name, p in model.named_parameters() if is_sharded(name, p.dim()))
    trained = _trained(model, settings)
    memory = estimate_memory(
        config,
        parameters,
        trained,
        matrices,
        cluster.ranks,
        cluster.zero_stage,
        cluster.precision,
        settings.batch.micro_sequences * rows.sequence_tokens,
        cluster.gradient_checkpointing,
    )
    each = checkpoint_bytes(parameters, trained, cluster.precision)
    return [
        (
            "memory",
            f"about {_gb(memory.total)} GB a rank: weights {_gb(memory.weights)}, gradients "
            f"{_gb(memory.gradients)}, optimizer {_gb(memory.optimizer)}, activations up to "
            f"{_gb(memory.activations)}",
        ),
        (
            "checkpoint",
            f"{each / 2**30:.2f} GB each, {kept.keep} kept, every {kept.every_steps} steps",
        ),
    ]


def _gb(size: float) -> str:
    return f"{size / 2**30:.1f}"


def _trained(model: FBSForCausalLM, settings: PretrainSettings) -> int:
    """The most parameters that any phase trains."""
    counts = []
    for what in {settings.phases.train, settings.phases.train_gated}:
        set_trained(model, what)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    return max(counts)
