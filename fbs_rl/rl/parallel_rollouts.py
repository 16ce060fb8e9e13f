"""Rollouts without an engine: episodes through the parallel pass of the model that learns.

What fbs_rl.serving.rollouts makes, with the same gate draws. Where tokens are known before gates act on them, one
pass over all rows takes the place of decoding. What the gated policy writes is decoded by the model's cached forward,
and then passed again with the skips that were executed: probabilities and NLLs are those of the pass, decisions those
of the writing. In float32 they agree; in 16 bits a few of them would be decided otherwise on the pass's own
probabilities, which the learner's mismatch figures count.
In float32 engines give the same skips, and the same tokens where they are greedy. A tool for studies, not for serving:
parallel passes save nothing by skipping.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fbs_rl.gate_trace import GateTrace
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.dense_continuations import DenseContinuations
from fbs_rl.rl.gated_continuations import write_gated
from fbs_rl.rl.parallel_pass import (
    Gates,
    GivenText,
    dense_gates,
    drawn_gates,
    pass_texts,
    replayed_gates,
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
    sampled_by: Sampler
    text: GivenText

    @property
    def seed(self) -> int:
        return self.task.seeds[self.sample]

    @property
    def prompt_tokens(self) -> int:
        """As an engine counts them: to it a text that is scored is all prompt."""
        written = self.sampled_by is Sampler.GATED
        return len(self.text.prompt_ids) + (0 if written else len(self.text.token_ids))


_Place = tuple[int, int, SegmentKind]
"""Where a segment belongs: task, sample, kind."""


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
        found = self._read(tasks, settings)
        if settings.sampled_by is Sampler.GATED and settings.max_new_tokens:
            found |= self._write(tasks, settings)
        return [
            EpisodeRollout(
                task.question_id,
                sample,
                seed,
                self.version,
                tuple(
                    found[place, sample, kind]
                    for kind in (SegmentKind.SELF, SegmentKind.GOLD)
                    if (place, sample, kind) in found
                ),
            )
            for place, task in enumerate(tasks)
            for sample, seed in enumerate(task.seeds)
        ]

    def texts(
        self, tasks: Sequence[RolloutTask], settings: RolloutSettings
    ) -> list[dict[SegmentKind, GivenText]]:
        """What is known of each task before gates act: the gold answer, and what the dense model writes if it does."""
        written: Sequence[tuple[int, ...] | None] = [None] * len(tasks)
        if settings.max_new_tokens and settings.sampled_by is Sampler.DENSE:
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
        self._dense |= self._passed_densely([text for text in texts if text not in self._dense])
        return [self._dense[text] for text in texts]

    def _passed_densely(self, texts: Sequence[GivenText]) -> dict[GivenText, np.ndarray]:
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return {}
        found = pass_texts(self.model, distinct, dense_gates(), self.batch_tokens)
        nll_RN = found.nll_RN.double().cpu().numpy()
        return {
            text: nll_N[: len(text.token_ids)].copy()
            for text, nll_N in zip(distinct, nll_RN, strict=True)
        }

    def _read(
        self, tasks: Sequence[RolloutTask], settings: RolloutSettings
    ) -> dict[_Place, SegmentRollout]:
        """The segments whose text is known before gates act."""
        sampler = {SegmentKind.GOLD: Sampler.GIVEN, SegmentKind.SELF: Sampler.DENSE}
        rows = [
            _Row(place, task, sample, kind, sampler[kind], text)
            for place, (task, known) in enumerate(
                zip(tasks, self.texts(tasks, settings), strict=True)
            )
            for sample in range(len(task.seeds))
            for kind, text in known.items()
        ]
        if settings.policy is None:
            gates = threshold_gates(settings.tau, settings.never_skip)
        else:
            seeds = [gate_seed(row.seed, row.kind) for row in rows]
            gates = drawn_gates(self.model.config, settings.policy, seeds, settings.never_skip)
        return self._segments(rows, gates, self.dense_nll([row.text for row in rows]))

    def _write(
        self, tasks: Sequence[RolloutTask], settings: RolloutSettings
    ) -> dict[_Place, SegmentRollout]:
        """The segments that the gated policy writes, one of each sample."""
        asked = [
            (place, task, sample)
            for place, task in enumerate(tasks)
            for sample in range(len(task.seeds))
        ]
        prompts = [task.prompt_ids for _, task, _ in asked]
        seeds = [task.seeds[sample] for _, task, sample in asked]
        made = write_gated(self.model, prompts, seeds, settings, self.batch_tokens)
        rows = [
            _Row(*where, SegmentKind.SELF, Sampler.GATED, text)
            for where, text in zip(asked, made.texts, strict=True)
        ]
        dense = self._passed_densely(made.texts)  # not kept: hardly one is written twice
        gates = replayed_gates(made.skip_LRC, settings.never_skip)
        return self._segments(rows, gates, [dense[text] for text in made.texts])

    def _segments(
        self, rows: Sequence[_Row], gates: Gates, dense: Sequence[np.ndarray]
    ) -> dict[_Place, SegmentRollout]:
        """One pass over the rows. dense: NLLs of each."""
        texts = [row.text for row in rows]
        found = pass_texts(self.model, texts, gates, self.batch_tokens).cpu()
        nll_RN = found.nll_RN.double().numpy()
        # Columns first: the rows of a trace are slices of it.
        skip_RCL = found.skip_LRC.permute(1, 2, 0).contiguous().numpy()
        prob_RCL = found.prob_LRC.permute(1, 2, 0).contiguous().numpy()
        opens_RC, chunks_RC = found.opens_RC.numpy(), found.chunks_RC.int().numpy()
        made: dict[_Place, SegmentRollout] = {}
        for number, row in enumerate(rows):
            prompt_ids, ids = row.text.prompt_ids, row.text.token_ids
            columns = len(ids) - 1
            trace = GateTrace(
                key=f"{row.task.question_id} {row.sample} {row.kind}",
                prompt_tokens=row.prompt_tokens,
                decode_start=len(prompt_ids),
                finished=True,
                skip_TL=skip_RCL[number, :columns],
                prob_TL=prob_RCL[number, :columns],
                version_T=np.full(columns, self.version, np.int32),
                protected_T=np.zeros(columns, np.uint8),
                closes_T=opens_RC[number, :columns],
                chunks_T=chunks_RC[number, :columns],
                replayed_tokens=0,
            )
            made[row.place, row.sample, row.kind] = SegmentRollout(
                row.kind, row.sampled_by, prompt_ids, ids, nll_RN[number, : len(ids)], dense[number], trace
            )  # fmt: skip
        return made

    def check(self, tasks: Sequence[RolloutTask], settings: RolloutSettings) -> None:
        """Raise ValueError, in one sentence, for what cannot be rolled."""
        if settings.sampled_by is Sampler.DENSE and settings.temperature != 0:
            raise ValueError(
                f"episodes.temperature is {settings.temperature}; without an engine the dense model writes greedily, "
                f'set it to 0 or episodes.sampled_by to "gated"'
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
