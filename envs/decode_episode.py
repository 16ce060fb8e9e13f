"""One episode: the model's own continuation is decoded, then the gold answer is scored, with skips in both.

The two phases start from the same prompt: the gold answer is read by a model that has not seen its own
continuation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from envs.episode import SegmentTrace
from envs.gated_sequence import GatedSequence
from envs.observation import Phase
from fbs_rl.rl.questions import EncodedQuestion
from fbs_rl.rl.reward import Sampler, SegmentKind
from fbs_rl.seeds import stable_hash

_HASHES = 2**63


@dataclass(frozen=True, slots=True)
class TokenRule:
    """How the decode phase picks tokens and when it ends.

    temperature: 0 is greedy. seed: of drawn tokens.
    """

    max_new_tokens: int
    end_ids: frozenset[int]
    temperature: float = 0.0
    seed: int = 0

    def pick(self, log_prob_V: Tensor, index: int) -> int:
        """Token `index` of the continuation, a pure function of the distribution and (seed, index)."""
        if self.temperature == 0:
            return int(log_prob_V.argmax())
        below_V = (log_prob_V / self.temperature).softmax(-1).cumsum(-1)
        uniform = stable_hash(self.seed, "token", index) / _HASHES * float(below_V[-1])
        return min(int(torch.searchsorted(below_V, uniform, right=True)), len(below_V) - 1)

    def ends(self, tokens: list[int]) -> bool:
        return tokens[-1] in self.end_ids or len(tokens) == self.max_new_tokens


@dataclass(slots=True)
class DecodeEpisode:
    """State of an episode.

    start: after the prompt, never fed. current: what the phase feeds. tokens, nll: of the phase so far;
    the last of them is fed next. done: traces of the phases that are over, the decode phase's first.
    """

    encoded: EncodedQuestion
    rule: TokenRule
    start: GatedSequence
    current: GatedSequence
    phase: Phase = Phase.DECODE
    tokens: list[int] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    done: list[SegmentTrace] = field(default_factory=list)

    @classmethod
    def begin(
        cls, encoded: EncodedQuestion, rule: TokenRule, start: GatedSequence
    ) -> DecodeEpisode:
        """The episode before its first column. A continuation of one token has none, so gold may come first."""
        episode = cls(encoded, rule, start, start.branch())
        episode._extend()
        return episode

    @property
    def finished(self) -> bool:
        return len(self.done) == len(Phase)

    @property
    def next_token(self) -> int:
        """The token that the next column feeds."""
        return self.tokens[-1]

    @property
    def columns(self) -> int:
        """Columns fed so far, over both phases."""
        return sum(trace.columns for trace in self.done) + len(self.current.fed) * (
            not self.finished
        )

    @property
    def progress(self) -> float:
        """Share of the phase's columns (at most so many, in the decode phase) that were fed."""
        gold = self.phase is Phase.GOLD
        tokens = len(self.encoded.answer_ids) if gold else self.rule.max_new_tokens
        return len(self.current.fed) / max(tokens - 1, 1)

    def advance(self, skip_L: Tensor) -> None:
        """Feed the next token with these skips (bool), then know the token after it."""
        assert not self.finished
        self.current.feed(self.next_token, skip_L)
        self._extend()

    def trace(self) -> SegmentTrace:
        """The current phase so far."""
        fed, gold = self.current, self.phase is Phase.GOLD
        none_L0 = torch.zeros(self.start.model.config.layer_count, 0, dtype=torch.bool)
        return SegmentTrace(
            kind=SegmentKind.GOLD if gold else SegmentKind.SELF,
            sampled_by=Sampler.GIVEN if gold else Sampler.GATED,
            prompt_tokens=fed.prompt_tokens,
            token_ids=tuple(self.tokens),
            nll_gated_N=torch.tensor(self.nll, dtype=torch.float64),
            skip_LT=torch.stack(fed.skips, 1) if fed.skips else none_L0,
            closed_chunks=None if fed.closed is None else tuple(fed.closed),
        )

    def _extend(self) -> None:
        """The token after the last fed one, and with it perhaps the end of the phase."""
        known, log_prob_V = len(self.tokens), self.current.reading.log_prob_V
        gold = self.phase is Phase.GOLD
        token = self.encoded.answer_ids[known] if gold else self.rule.pick(log_prob_V, known)
        self.tokens.append(token)
        self.nll.append(-float(log_prob_V[token]))
        over = (
            len(self.tokens) == len(self.encoded.answer_ids)
            if gold
            else self.rule.ends(self.tokens)
        )
        if not over:
            return
        self.done.append(self.trace())
        if not gold:
            self.phase, self.current = Phase.GOLD, self.start.branch()
            self.tokens, self.nll = [], []
            self._extend()
