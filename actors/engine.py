"""A DeepSpeed engine around an FBS model: what differs between ZeRO stages and precisions stays in here."""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from actors.sharded_model import ShardedModel
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.training.parameters import parameter_groups, set_trained
from fbs_rl.training.settings import PretrainSettings

TAG = "engine"
"""Folder of DeepSpeed's files inside a checkpoint."""
UNIVERSAL = "universal"
"""Folder of DeepSpeed's files converted so that any number of ranks can load them."""


@dataclass(slots=True)
class Engine:
    """deepspeed: the engine. groups: each parameter group's own options. sharded: at ZeRO-3."""

    deepspeed: Any
    groups: list[dict[str, Any]]
    settings: PretrainSettings
    ranks: int
    float_buffers: dict[str, torch.Tensor]
    sharded: ShardedModel | None = None

    @classmethod
    def build(
        cls,
        model: FBSForCausalLM,
        settings: PretrainSettings,
        ranks: int,
        trains: str,
        device: torch.device,
        universal: bool = False,
    ) -> Engine:
        """An engine that trains `trains` (all, new or gates) of `model`."""
        import deepspeed

        set_trained(model, trains)
        groups = parameter_groups(model, settings.optimizer)
        adamw = settings.optimizer
        optimizer = torch.optim.AdamW(
            groups,
            betas=(adamw.beta1, adamw.beta2),
            eps=adamw.epsilon,
            fused=device.type == "cuda",
        )
        buffers = {
            name: buffer.clone()
            for name, buffer in model.named_buffers()
            if buffer.is_floating_point()
        }
        sharded = ShardedModel(model) if settings.cluster.zero_stage == 3 else None
        made = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(settings, ranks, universal),
            dist_init_required=False,
        )[0]
        options = [{name: g[name] for name in g.keys() - {"params"}} for g in groups]
        engine = cls(made, options, settings, ranks, buffers, sharded)
        engine._restore_buffers()
        if sharded is not None:
            sharded.keep_rest_whole(made)
        return engine

    def rebuilt(self, model: FBSForCausalLM, trains: str, device: torch.device) -> Engine:
        """A new engine, with a fresh optimizer, around `model`: what whole_model() gave, or a change of it."""
        self.deepspeed.destroy()
        for parameter in model.parameters():
            parameter.grad = None
        fresh = model if self.sharded is not None else copy.deepcopy(model)
        return Engine.build(fresh, self.settings, self.ranks, trains, device)

    def whole_model(self) -> FBSForCausalLM:
        """The model with all of its weights on this rank: the live one, but at ZeRO-3 a copy. All ranks must call."""
        return self.module if self.sharded is None else self.sharded.whole(self.module)

    @property
    def module(self) -> FBSForCausalLM:
        return self.deepspeed.module

    @property
    def description(self) -> str:
        return f"{type(self.deepspeed.optimizer).__name__} of AdamW, ZeRO {self.settings.cluster.zero_stage}"

    def _restore_buffers(self) -> None:
        """bf16 engines cast buffers too; rotary frequencies in bf16 would turn positions into noise."""
        for name, buffer in self.float_buffers.items():
            owner, _, last = name.rpartition(".")
            module = self.module.get_submodule(owner)
            setattr(module, last, buffer.to(getattr(module, last).device))

    # --- a step -----------------------------------------------------------------------------------

    def set_rates(self, scale: float) -> None:
        """Learning rates of the next step: `scale` times each group's peak."""
        for group, own in zip(self.deepspeed.optimizer.param_groups, self.groups, strict=True):
            group["lr"] = scale * own["peak_lr"]

    @property
    def _sums_itself(self) -> bool:
        """At stage 1 gradients are summed here, a group of parameters at once.

        DeepSpeed takes them parameter by parameter: with the hundreds of small tensors of FBS modules that is
        time of the host in which the device waits.
        """
        return self.settings.cluster.zero_stage == 1

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return (self.module if self._sums_itself else self.deepspeed)(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Add this call's share of the step's gradient.

        DeepSpeed averages over ranks and, unless told not to, over accumulation steps; shares are summed.
        """
        if self._sums_itself:
            loss.backward()
        else:
            self.deepspeed.backward(loss * self.ranks, scale_wrt_gas=False)
        if not self.deepspeed.is_gradient_accumulation_boundary():
            self.deepspeed.step()  # counts the micro-batch; nothing is applied

    def step(self) -> tuple[float, bool]:
        """Clip and apply the gradient: (its norm before clipping, whether it was applied; not if non-finite)."""
        if self.settings.cluster.zero_stage == 0:
            return self._step_without_zero()
        if self._sums_itself:
            self._sum_gradients()
        elif self.settings.cluster.zero_stage == 2 and self.settings.cluster.precision == "bf16":
            # DeepSpeed's own check reads every tensor three times and waits for each: let it look only when
            # one look at all of them says that it must (its way out of a bad step is then the one it knows).
            self.deepspeed.optimizer.check_grad_overflow = not self._finite_gradients()
        skipped = self.deepspeed.skipped_steps
        self.deepspeed.step()
        applied = self.deepspeed.skipped_steps == skipped
        return float(self.deepspeed.get_global_grad_norm()), applied

    def _step_without_zero(self) -> tuple[float, bool]:
        """Without ZeRO, DeepSpeed neither reports the norm nor refuses a non-finite gradient."""
        trained = [p for p in self.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        finite = math.isfinite(float(norm))
        if finite:
            limit = self.settings.optimizer.clip_norm
            torch.nn.utils.clip_grads_with_norm_(trained, limit, norm)
        else:
            self.module.zero_grad(set_to_none=True)  # AdamW leaves what has no gradient as it is
        self.deepspeed.step()
        return float(norm), finite

    @torch.no_grad()
    def _sum_gradients(self) -> None:
        """Hand DeepSpeed this rank's part of the summed gradient, in the flat layout it keeps each group in."""
        zero = self.deepspeed.optimizer
        for index, members in enumerate(zero.round_robin_bit16_groups):
            flat = torch.zeros_like(zero.bit16_groups_flat[index])
            views, gradients = [], []
            for parameter, offset in zip(
                members, zero.round_robin_bit16_offsets[index], strict=True
            ):
                if parameter.grad is not None:
                    views.append(flat.narrow(0, offset, parameter.numel()).view(parameter.shape))
                    gradients.append(parameter.grad)
                    parameter.grad = None
            if views:
                torch._foreach_copy_(views, gradients)  # pyright: ignore[reportPrivateImportUsage]
            if self.ranks > 1:
                torch.distributed.all_reduce(flat)
            size = int(zero.partition_size[index])
            first = size * (torch.distributed.get_rank() if self.ranks > 1 else 0)
            zero.averaged_gradients[index] = [flat.narrow(0, first, size)]

    def _finite_gradients(self) -> bool:
        """Whether the gradients that this and all other ranks will apply are finite."""
        averaged = self.deepspeed.optimizer.averaged_gradients
        tensors = [
            g for group in averaged.values() if group is not None for g in group if g is not None
        ]
        if not tensors:
            return True
        norms = torch._foreach_norm(tensors)  # pyright: ignore[reportPrivateImportUsage]
        bad = 1.0 - torch.stack(norms).isfinite().all().float()
        if self.ranks > 1:
            torch.distributed.all_reduce(bad)
        return not bool(bad)

    # --- checkpoints ------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """Write this rank's files under `folder`; all ranks must."""
        # The mark lets a later run with another number of ranks convert the checkpoint.
        marks = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        self.deepspeed.save_checkpoint(str(folder), tag=TAG, client_state=marks, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read what `save` wrote; raises FileNotFoundError if it is not there."""
        loaded, _ = self.deepspeed.load_checkpoint(str(folder), tag=tag)
        if loaded is None:
            raise FileNotFoundError(f"{folder}/{tag} holds no DeepSpeed checkpoint")
        if self.sharded is not None and tag == UNIVERSAL:
            self._untie_groups()

    def _untie_groups(self) -> None:
        """From converted files ZeRO-3 gives every group the first one's options, and one step counter to all."""
        optimizer = self.deepspeed.optimizer.optimizer
        for group, own in zip(optimizer.param_groups, self.groups, strict=True):
            group.update(own)
        for state in optimizer.state.values():
            state["step"] = state["step"].clone()


def to_universal(source: Path, target: Path) -> None:
    """Convert DeepSpeed's files in `source` so that any number of ranks can load them from `target`."""
    from deepspeed.checkpoint.ds_to_universal import main

    arguments = {
        "input_folder": str(source),
        "output_folder": str(target),
        "num_extract_workers": 1,
        "num_merge_workers": 1,
        "keep_temp_folder": False,
        "strict": True,
        "inject_missing_state": False,
    }
    main(argparse.Namespace(**arguments))


def deepspeed_config(settings: PretrainSettings, ranks: int, universal: bool) -> dict[str, Any]:
    """DeepSpeed's own configuration for these settings."""
    cluster, batch = settings.cluster, settings.batch
    config: dict[str, Any] = {
        "train_batch_size": batch.step_sequences,
        "train_micro_batch_size_per_gpu": batch.micro_sequences,
        "gradient_accumulation_steps": batch.accumulation(ranks),
        # At stage 0 it cannot clip a step that has no gradient: Engine.step does.
        "gradient_clipping": settings.optimizer.clip_norm if cluster.zero_stage else 0.0,
        "steps_per_print": 2**31 - 1,
    }
    if cluster.zero_stage:
        config["zero_optimization"] = {"stage": cluster.zero_stage}
    if cluster.zero_stage == 1:  # no hooks on parameters: Engine sums their gradients
        config["zero_optimization"] |= {"contiguous_gradients": False, "overlap_comm": False}
    if cluster.zero_stage == 3:  # what stays whole is chosen by name (ShardedModel)
        config["zero_optimization"] |= {"stage3_param_persistence_threshold": 0}
    if cluster.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return config
