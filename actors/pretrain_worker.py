"""One rank of Stage 1: a model in a DeepSpeed engine that takes steps, evaluates, saves and exports.

A plain class, so that it runs in a Ray actor (actors/gang.py makes one of it) or, with one rank, in any
process. It keeps no notion of progress: the caller names the step, and everything about a step follows
from its number.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors.engine import TAG, Engine, to_universal
from actors.rank_process import meet_ranks, memory_figures, own_address, place_facts, rank_device
from fbs_rl.checkpoint import LoadedModel, export_model, load_model
from fbs_rl.config import from_tree
from fbs_rl.data.shards import PackedShards
from fbs_rl.model.chunk_loss import class_weights
from fbs_rl.model.compiled import as_written, compile_from_now_on
from fbs_rl.model.gate_fit import centre_gates, fit_in_closed_form
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.seeds import stable_hash
from fbs_rl.training.batches import MicroBatch, StepReader, to_micro_batch
from fbs_rl.training.costs import peak_flops, training_flops_per_token
from fbs_rl.training.evaluation import evaluate, find_threshold
from fbs_rl.training.order import DataOrder
from fbs_rl.training.schedule import Phase, StepPlan, plan_step
from fbs_rl.training.settings import PretrainSettings
from fbs_rl.training.start import read_start, starts_plain
from fbs_rl.training.step_report import StepSums
from fbs_rl.types import GateMode, LossCounts, LossScope

_LABEL_ROWS = 512  # rows that the weights of the boundary classes are counted on
_FIT_ROWS = 16


class PretrainWorker:
    """rank of ranks. settings_tree: nested dictionaries of PretrainSettings, as an actor can be sent them."""

    def __init__(self, rank: int, ranks: int, settings_tree: dict[str, Any]) -> None:
        self.rank, self.ranks = rank, ranks
        self.settings = from_tree(PretrainSettings, settings_tree)
        torch.set_num_threads(self.settings.cluster.threads_per_rank)
        self.device = rank_device("cluster.device", self.settings.cluster.device)
        self.teacher: FBSForCausalLM | None = None
        self.rate_L: Tensor | None = None
        self.window_P: Tensor | None = None

    # --- start ------------------------------------------------------------------------------------

    def address(self) -> tuple[str, int]:
        """(host, free port) at which rank 0 can be met."""
        return own_address()

    def start(
        self,
        host: str,
        port: int,
        step: int,
        resume: dict[str, Any] | None,
        made: LoadedModel | None = None,
    ) -> dict[str, Any]:
        """Meet the other ranks, read model and data, and be ready for `step`.

        resume: {"folder", "tag", "state"} of a checkpoint. made: the model, if the caller in this process has
        made it (benchmarks of random weights). Returns what the driver wants to know.
        """
        settings = self.settings
        meet_ranks(
            self.rank, self.ranks, host, port, self.device, settings.cluster.threads_per_rank,
            settings.cluster.step_deadline_s,
        )  # fmt: skip
        self.train_rows = PackedShards.open(settings.data, "train")
        self.heldout_rows = PackedShards.open(settings.data, "heldout")
        model = self._take_model(made or read_start(self.settings.model))
        self.reader = StepReader(
            self.train_rows,
            DataOrder(len(self.train_rows), settings.seed),
            settings.seed,
            settings.batch.step_sequences,
            settings.phases.decode_start_frac,
            self._class_weights(),
            self.device,
            settings.phases.dense_rows_frac,
        )
        self.trains = self.plan(max(step - 1, 0)).trains
        universal = resume is not None and resume["tag"] != TAG
        self.engine = Engine.build(model, settings, self.ranks, self.trains, self.device, universal)
        if resume is not None:
            self._restore(resume)
        if step > 0 and self.plan(step - 1).phase is Phase.GATED:
            model.config.gates_origin = "trained"
        return self._facts(model)

    def plan(self, step: int) -> StepPlan:
        return plan_step(step, self.settings.phases, self.settings.optimizer)

    def _take_model(self, loaded: LoadedModel) -> FBSForCausalLM:
        self.tokenizer = loaded.tokenizer
        model = loaded.model
        model.config._attn_implementation = self.settings.cluster.attention
        model.model.document_attention = self.settings.cluster.document_attention
        if model.model.preview is not None and starts_plain(self.settings.model):
            model.model.preview.set_vocabulary(self._token_counts())
        if self.settings.cluster.compiles and self.device.type == "cuda":
            compile_from_now_on()
        if self.settings.cluster.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        return model.to(self.device)  # pyright: ignore[reportArgumentType]

    def _token_counts(self) -> Tensor:
        """Occurrences of each token in the first rows of the data, for the preview vocabulary."""
        rows = self.train_rows.rows(_spread(len(self.train_rows), 8 * _LABEL_ROWS))
        ids = torch.from_numpy(rows.ids_BT)[torch.from_numpy(rows.document_BT) >= 0]
        return torch.bincount(ids, minlength=self.train_rows.vocabulary)

    def _class_weights(self) -> Tensor:
        rows = self.train_rows.rows(_spread(len(self.train_rows), _LABEL_ROWS))
        return class_weights(torch.from_numpy(rows.chunk_label_BT)).to(self.device)

    def _restore(self, resume: dict[str, Any]) -> None:
        self.engine.load(Path(resume["folder"]), resume["tag"])
        state = resume["state"]
        for name in ("rate_L", "window_P"):
            value = state.get(name)
            setattr(self, name, None if value is None else torch.tensor(value, dtype=torch.float64))

    def _facts(self, model: FBSForCausalLM) -> dict[str, Any]:
        peak = peak_flops(self.device)
        return {
            **place_facts(self.device),
            "peak_flops": None if peak is None else peak * self.ranks,
            "flops_per_token": training_flops_per_token(
                model.config, self.train_rows.sequence_tokens
            ),
            "optimizer": self.engine.description,
        }

    # --- a step -----------------------------------------------------------------------------------

    def run_step(self, step: int) -> dict[str, Any]:
        """Take optimizer step `step` (0-based); its figures, equal on all ranks but for timings."""
        began = time.perf_counter()
        plan = self.plan(step)
        self._enter_phase(plan)
        batches = self.reader.micro_batches(
            step, self.rank, self.ranks, self.settings.batch.micro_sequences
        )
        for batch in batches:
            batch.chunk_labels.force_cross_entropy = plan.force_cross_entropy
        config = self.model.config
        scope = LossScope(
            self._counts(batches, step), self.rate_L, self.window_P, plan.preview_scale
        )
        placed = replace(
            scope, rate_L=self._placed(self.rate_L), window_P=self._placed(self.window_P)
        )
        sums = StepSums(config, self.device)
        self.engine.set_rates(plan.lr_scale)
        for batch in batches:
            sums.add(self._accumulate(batch, plan, placed), batch)
        gradient_norm, applied = self.engine.step()
        self.model.model.forget_derived()
        totals = self.reduce(sums.vector())
        figures = sums.figures(totals, scope, plan)
        if applied and figures["train/finite"]:
            self.rate_L, self.window_P = sums.means(totals, scope.counts)
        return {
            **figures,
            "train/grad_norm": gradient_norm,
            "train/applied": applied,
            "train/lr": plan.lr_scale * self.settings.optimizer.lr_backbone,
            **self._timing(time.perf_counter() - began, figures["train/tokens"]),
        }

    @property
    def model(self) -> FBSForCausalLM:
        return self.engine.module

    def _enter_phase(self, plan: StepPlan) -> None:
        """Where phase 1b begins: fit gates if asked, and build the optimizer anew if it trains other things."""
        phases = self.settings.phases
        fits = phases.gate_start == "fitted"
        if plan.step == phases.observed_steps and (fits or plan.trains != self.trains):
            model = self.engine.whole_model()
            if fits:
                self._fit_gates(model, plan.skip_target)
            self.trains = plan.trains
            self.engine = self.engine.rebuilt(model, plan.trains, self.device)
        if plan.phase is Phase.GATED:
            self.model.config.gates_origin = "trained"

    def _fit_gates(self, model: FBSForCausalLM, skip_target: float) -> None:
        rows = self.train_rows.rows(_spread(len(self.train_rows), _FIT_ROWS))
        start = rows.ids_BT.shape[1] // 4
        ids = torch.from_numpy(rows.ids_BT)
        with as_written():
            fit_in_closed_form(model, ids, start)
            centre_gates(model, ids, start, skip_target)

    def _counts(self, batches: Sequence[MicroBatch], step: int) -> LossCounts:
        own = [batch.counts(self.model.config, step) for batch in batches]
        table = [[c.lm, c.preview, c.window, c.gated, c.rows] for c in own]
        return LossCounts(*self.reduce(torch.tensor(table, dtype=torch.float64).sum(0)).tolist())

    def _accumulate(self, batch: MicroBatch, plan: StepPlan, scope: LossScope) -> Any:
        self.engine.module.train()
        dense = None
        if self.teacher is not None and plan.phase is Phase.GATED:
            dense = self.teacher.dense_reference(
                batch.ids_BT, batch.valid_BT, None, batch.document_BT, plan.window_temperature
            )
        out = self.engine.forward(
            batch.ids_BT,
            batch.valid_BT,
            labels=batch.labels_BT,
            gates=plan.mode,
            tau=plan.tau,
            decode_start=batch.decode_start_B,
            gate_seed=batch.gate_seed_B if plan.mode is GateMode.SAMPLE else None,
            gate_temperature=plan.gate_temperature,
            window_temperature=plan.window_temperature,
            document_ids=batch.document_BT,
            chunk_labels=batch.chunk_labels,
            dense=dense,
            loss_seed=plan.step,
            skip_target=plan.skip_target,
            loss_scope=scope,
            with_logits=False,
        )
        self.engine.backward(out.loss)
        return out

    def _placed(self, means: Tensor | None) -> Tensor | None:
        """On the device before the step's work is queued: a copy in its midst would wait for all of it."""
        return None if means is None else means.float().to(self.device)

    def reduce(self, sums: Tensor) -> Tensor:
        """Sums over ranks, as float64 on the CPU."""
        if self.ranks == 1:
            return sums.double().cpu()
        moved = sums.double().to(self.device)
        torch.distributed.all_reduce(moved)
        return moved.cpu()

    def _timing(self, seconds: float, tokens: float) -> dict[str, float]:
        rates = {"perf/step_s": seconds, "perf/tokens_per_s": tokens / seconds}
        return rates | memory_figures(self.device)

    # --- evaluation, checkpoints ---------------------------------------------------------------------

    def evaluate(self) -> dict[str, float]:
        """Held-out figures, equal on all ranks."""
        tuning, scored = self.heldout_batches()
        ratios = self.settings.evaluation.skip_ratios
        with as_written():
            return evaluate(self.model, tuning, scored, ratios, self.reduce)

    def heldout_batches(self) -> tuple[list[MicroBatch], list[MicroBatch]]:
        """This rank's share of the sequences that thresholds are found on, and of those that are scored."""
        wanted, count = self.settings.evaluation, len(self.heldout_rows)
        calibration = min(wanted.calibration_sequences, max(count // 2, 1))
        rows = list(range(min(count, calibration + wanted.sequences)))
        return self._heldout(rows[:calibration]), self._heldout(rows[calibration:] or rows)

    def _heldout(self, rows: list[int]) -> list[MicroBatch]:
        """This rank's share; shares are equal in number of batches, short ones are filled with empty rows."""
        size = self.settings.batch.micro_sequences
        per_rank = -(-len(rows) // (size * self.ranks)) * size
        mine = rows[self.rank * per_rank : (self.rank + 1) * per_rank]
        packed = self.heldout_rows.rows(mine or [0])
        start = packed.ids_BT.shape[1] // 4
        batches = []
        for first in range(0, per_rank, size):
            part = mine[first : first + size]
            packed = self.heldout_rows.rows(part or [0])
            # A rank without rows of its own takes part in the collectives and scores nothing.
            begin = start if part else packed.ids_BT.shape[1]
            batches.append(
                to_micro_batch(
                    packed,
                    [begin] * len(packed.ids_BT),
                    [0] * len(packed.ids_BT),
                    None,
                    self.device,
                )
            )
        return batches

    def sample(self) -> list[dict[str, str]]:
        """Greedy continuations of held-out text, dense and gated at the last skip ratio."""
        wanted = self.settings.evaluation
        length = min(64, self.heldout_rows.sequence_tokens // 2)
        rows = self.heldout_rows.rows(_spread(len(self.heldout_rows), wanted.sample_prompts))
        modes: dict[str, dict[str, Any]] = {"dense": {"gates": "dense"}}
        model = self.engine.whole_model().eval()
        if model.config.gate and wanted.skip_ratios:
            tuning = self._heldout(list(range(min(4, len(self.heldout_rows)))))
            tau = find_threshold(model, tuning, wanted.skip_ratios[-1], self.reduce)
            modes["gated"] = {"gates": "threshold", "tau": tau}
        table = []
        for ids_T in torch.from_numpy(rows.ids_BT[:, :length]).to(self.device):
            row = {"prompt": self.tokenizer.decode(ids_T)}
            for name, gates in modes.items():
                with torch.no_grad():
                    made = model.generate(
                        ids_T[None],
                        attention_mask=torch.ones_like(ids_T[None]),
                        max_new_tokens=wanted.sample_tokens,
                        do_sample=False,
                        **gates,
                    )
                row[name] = str(self.tokenizer.decode(made[0, length:]))
            table.append(row)
        return table

    def save(self, folder: str) -> dict[str, Any]:
        """Write this rank's part of a checkpoint; returns the state that is not in the engine."""
        self.engine.save(Path(folder))
        return {
            name: None if value is None else value.tolist()
            for name, value in (("rate_L", self.rate_L), ("window_P", self.window_P))
        }

    def convert(self, source: str, target: str) -> None:
        """Make of a checkpoint's files `source` what any number of ranks can load (rank 0; before `start`)."""
        if self.rank == 0:
            to_universal(Path(source), Path(target))

    def digest(self, folder: str, names: list[str]) -> dict[str, str]:
        """sha256 of this rank's share of the named files."""
        found = {}
        for name in names[self.rank :: self.ranks]:
            with (Path(folder) / name).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
        return found

    def export(self, folder: str, tau: float | None = None) -> None:
        """Write a Hugging Face folder of the live model (rank 0 writes; all ranks must call).

        tau: the threshold at which it skips when a call does not say; None: such a call skips nothing.
        """
        model = self.engine.whole_model()
        if self.rank == 0:
            export_model(model, self.tokenizer, Path(folder), tau)

    def read_teacher(self, folder: str) -> None:
        """Distil from the model in `folder` from now on."""
        dtype = torch.bfloat16 if self.settings.cluster.precision == "bf16" else torch.float32
        teacher: Any = load_model(folder, dtype=dtype).model
        self.teacher = teacher.to(self.device).requires_grad_(False)


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` different indices below `count` (all, if there are fewer), the same in every process."""
    stride = max(1, count // max(wanted, 1))
    offset = stable_hash("spread", count, wanted) % stride
    return list(range(offset, count, stride))[:wanted]
