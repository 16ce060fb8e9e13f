"""Rollouts without an engine: dense-written episodes through the parallel pass of the model that learns.

What fbs_rl.serving.rollouts makes, with the same draws, where nothing is written by the gated policy: tokens are
known before gates act on them, so one pass over all rows takes the place of decoding. In float32 both give the same
tokens and skips; nothing is saved by skipping here, which makes it a tool for studies, not for serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fbs_rl.gate_trace import GateTrace
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.dense_continuations import DenseContinuations
from fbs_rl.rl.parallel_pass import (
    GivenText,
    PassedTexts,
    dense_gates,
    drawn_gates,
    pass_texts,
    threshold_gates,
)
from fbs_rl.rl.reward import Sampler, SegmentKind
from fbs_rl.rl.rollout import (
    EpisodeRollout,
    RolloutSettings,
    RolloutTask,
    SegmentRollout,
    gate_seed,
)


@dataclass(frozen=True, slots=True)
class _Row:
    """One segment of one sample. place: of the task in its list."""

    place: int
    task: RolloutTask
    sample: int
    kind: SegmentKind
    text: GivenText

    @property
    def seed(self) -> int:
        return gate_seed(self.task.seeds[self.sample], self.kind)


class ParallelRollouts:
    """Rolls under the gates that `model` holds at the time of the call. version: of these gates, as traces name it.

    batch_tokens: of one pass, padding included.
    """

    def __init__(self, model: FBSForCausalLM, batch_tokens: int) -> None:
        if not model.config.gate:
            raise ValueError("the model was made without gates; rollouts draw from them")
        if batch_tokens < 1:
            raise ValueError(f"batch_tokens is {batch_tokens}; it must be above 0")
        self.model, self.batch_tokens, self.version = model, batch_tokens, 0
        self.continuations = DenseContinuations(model, batch_tokens)
        self._dense: dict[GivenText, np.ndarray] = {}

    def forget_dense(self) -> None:
        """Drop the dense NLLs: needed when something other than the Skip-Gates has changed."""
        self._dense.clear()

    def roll(self, tasks: Sequence[RolloutTask], settings: RolloutSettings) -> list[EpisodeRollout]:
        """All samples of all tasks, task by task.

        Raises ValueError, before anything runs, for settings or a question that cannot work.
        """
        self.check(tasks, settings)
        if not tasks:
            return []
        texts = self.texts(tasks, settings)
        rows = [
            _Row(place, task, sample, kind, text)
            for place, (task, segments) in enumerate(zip(tasks, texts, strict=True))
            for sample in range(len(task.seeds))
            for kind, text in segments.items()
        ]
        config, never_skip = self.model.config, settings.never_skip
        if settings.policy is None:
            gates = threshold_gates(settings.tau, never_skip)
        else:
            seeds = [row.seed for row in rows]
            gates = drawn_gates(config, settings.policy, seeds, never_skip)
        given = [row.text for row in rows]
        found = pass_texts(self.model, given, gates, self.batch_tokens).cpu()
        return self._episodes(rows, found, self.dense_nll(given))

    def texts(
        self, tasks: Sequence[RolloutTask], settings: RolloutSettings
    ) -> list[dict[SegmentKind, GivenText]]:
        """The segments of each task: the dense model's continuation, if any is asked for, and the gold answer."""
        written: Sequence[tuple[int, ...] | None] = [None] * len(tasks)
        if settings.max_new_tokens:
            prompts = [task.prompt_ids for task in tasks]
            written = self.continuations.of(prompts, settings.max_new_tokens, settings.end_ids)
        made = []
        for task, token_ids in zip(tasks, written, strict=True):
            gold = GivenText(task.prompt_ids, task.answer_ids)
            own = {} if token_ids is None else {SegmentKind.SELF: GivenText(task.prompt_ids, token_ids)}  # fmt: skip
            made.append({**own, SegmentKind.GOLD: gold})
        return made

    def dense_nll(self, texts: Sequence[GivenText]) -> list[np.ndarray]:
        """NLLs [N] of each text with nothing skipped, float64, nats; kept until forget_dense."""
        missing = list(dict.fromkeys(text for text in texts if text not in self._dense))
        if missing:
            found = pass_texts(self.model, missing, dense_gates(), self.batch_tokens).cpu()
            for text, nll_N in zip(missing, found.nll_RN.double().numpy(), strict=True):
                self._dense[text] = nll_N[: len(text.token_ids)].copy()
        return [self._dense[text] for text in texts]

    def _episodes(
        self, rows: Sequence[_Row], found: PassedTexts, dense: Sequence[np.ndarray]
    ) -> list[EpisodeRollout]:
        nll_RN = found.nll_RN.double().numpy()
        # Columns first: the rows of a trace are slices of it.
        skip_RCL = found.skip_LRC.permute(1, 2, 0).contiguous().numpy()
        prob_RCL = found.prob_LRC.permute(1, 2, 0).contiguous().numpy()
        opens_RC, chunks_RC = found.opens_RC.numpy(), found.chunks_RC.int().numpy()
        held: dict[tuple[int, int], list[SegmentRollout]] = {}
        for number, row in enumerate(rows):
            ids, prompt = row.text.token_ids, len(row.text.prompt_ids)
            columns = len(ids) - 1
            trace = GateTrace(
                key=f"{row.task.question_id} {row.sample} {row.kind}",
                prompt_tokens=prompt + len(ids),  # to an engine a scored text is all prompt
                decode_start=prompt,
                finished=True,
                skip_TL=skip_RCL[number, :columns],
                prob_TL=prob_RCL[number, :columns],
                version_T=np.full(columns, self.version, np.int32),
                protected_T=np.zeros(columns, np.uint8),
                closes_T=opens_RC[number, :columns],
                chunks_T=chunks_RC[number, :columns],
                replayed_tokens=0,
            )
            sampler = Sampler.GIVEN if row.kind is SegmentKind.GOLD else Sampler.DENSE
            nll_N = nll_RN[number, : len(ids)]
            segment = SegmentRollout(
                row.kind, sampler, row.text.prompt_ids, ids, nll_N, dense[number], trace
            )
            held.setdefault((row.place, row.sample), []).append(segment)
        tasks = {row.place: row.task for row in rows}
        return [
            EpisodeRollout(
                tasks[place].question_id,
                sample,
                tasks[place].seeds[sample],
                self.version,
                tuple(made),
            )
            for (place, sample), made in held.items()
        ]

    def check(self, tasks: Sequence[RolloutTask], settings: RolloutSettings) -> None:
        """Raise ValueError, in one sentence, for what cannot be rolled."""
        if settings.sampled_by is not Sampler.DENSE:
            raise ValueError(
                'episodes.sampled_by is "gated"; parallel rollouts know all tokens before gates act, set it to "dense"'
            )
        if settings.temperature != 0:
            raise ValueError(
                f"episodes.temperature is {settings.temperature}; parallel rollouts write greedily, set it to 0"
            )
        config = self.model.config
        config.forced_layers(settings.never_skip)
        for task in tasks:
            needed = len(task.prompt_ids) + max(len(task.answer_ids), settings.max_new_tokens)
            if needed > config.max_position_embeddings:
                raise ValueError(
                    f"question {task.question_id} needs {needed} tokens, but the model's context is "
                    f"{config.max_position_embeddings}; leave the question out"
                )
            if max(*task.prompt_ids, *task.answer_ids) >= config.vocab_size:
                raise ValueError(
                    f"question {task.question_id} has a token beyond the model's vocabulary of {config.vocab_size}; "
                    f"encode it with the model's own tokenizer"
                )
