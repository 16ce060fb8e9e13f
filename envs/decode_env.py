"""fbs_rl/Decode-v0: decoding as an episode of skip decisions, one token a step (docs/environment.md)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from rich.color import ColorSystem
from torch import Tensor

from envs.decode_episode import DecodeEpisode, TokenRule
from envs.encoding import Encoder, check_fits, encode_completion
from envs.episode import SegmentTrace, dense_nll, segment_outcome
from envs.gated_sequence import GatedSequence
from envs.observation import Observation, make_space, observe, sign_projection
from envs.payment import heading_for
from envs.settings import EnvSettings, PolicyCost, RewardAt
from fbs_rl.checkpoint import load_model
from fbs_rl.decoding import end_token_ids
from fbs_rl.model.modeling import FBSForCausalLM
from fbs_rl.rl.questions import Question
from fbs_rl.rl.reward import EpisodeReward, SegmentOutcome, episode_reward
from fbs_rl.shading import PieceJoiner, shade
from fbs_rl.types import GateMode

Action = np.ndarray[Any, np.dtype[np.int8]]
"""[L] of 0 and 1: the layers to skip for the token that is fed next."""
_OPTIONS = ("question", "token_seed", "policy_cost")
_SEEDS = 2**63


class DecodeEnv(gymnasium.Env[Observation, Action]):
    """A question is answered by the model, then its gold answer is scored; the agent skips layers in both.

    An action is executed except for layers that never skip, which run anyway; the info's "executed" is what
    counted. Terminated: the gold answer is scored. Truncated: only by settings.max_steps (or a TimeLimit
    wrapper); a continuation that reaches max_new_tokens ends its phase, not the episode.

    The reward is R of `fbs_rl.rl.reward`, whose terms are in the last info's "reward_terms".
    """

    metadata = {"render_modes": ["ansi"], "render_fps": 4}

    def __init__(
        self,
        model: FBSForCausalLM | str,
        questions: Sequence[Question],
        tokenizer: Any = None,
        settings: EnvSettings | None = None,
        render_mode: str | None = None,
        encode: Encoder = encode_completion,
    ) -> None:
        """model: loaded, or what `load_model` reads (a folder). tokenizer: None takes the folder's.

        Raises ValueError, in one sentence, for a question that does not fit or a model that cannot skip.
        """
        if isinstance(model, str):
            loaded = load_model(model)
            model, tokenizer = loaded.model, tokenizer or loaded.tokenizer
        if tokenizer is None:
            raise ValueError("a loaded model needs its tokenizer; give both, or the model's folder")
        if not questions:
            raise ValueError("no questions were given; an episode starts from one")
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise ValueError(f'render_mode is {render_mode!r}; it can be "ansi" or None')
        self.model, self.tokenizer, self.render_mode = model, tokenizer, render_mode
        self.settings = settings or EnvSettings()
        self.forced = model.config.forced_layers(self.settings.never_skip)
        layers = model.config.layer_count
        if len(self.forced) == layers:
            raise ValueError(
                f"all {layers} layers of this model always run; give a model with gates, or a shorter never_skip"
            )
        self.questions = tuple(questions)
        self.encoded = tuple(encode(question, tokenizer) for question in questions)
        for made in self.encoded:
            check_fits(made, self.settings.max_new_tokens, model.config.max_position_embeddings)
        self.action_space = spaces.MultiBinary(layers)
        self.observation_space: spaces.Dict = make_space(model.config, self.settings.state_features)  # pyright: ignore[reportIncompatibleVariableOverride]
        self._projection_Sd = sign_projection(
            self.settings.state_features, model.config.hidden_size
        )
        self._end_ids = end_token_ids(model, tokenizer.eos_token_id)
        self.question_index, self.policy_cost = 0, self.settings.policy_cost
        self._gold_dense: dict[int, Tensor] = {}
        self._self_dense_N: Tensor | None = None
        self._episode: DecodeEpisode | None = None
        self._paid, self._truncated = 0.0, False

    # --- gymnasium --------------------------------------------------------------------------------

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """The first token is picked, not fed.

        options: "question" (an index), "token_seed" (of drawn tokens), both drawn from np_random where
        they are missing, and "policy_cost" (a PolicyCost; None: the settings').
        """
        super().reset(seed=seed)
        given = options or {}
        unknown = sorted(given.keys() - set(_OPTIONS))
        if unknown:
            raise ValueError(f"reset has no option {unknown[0]!r}; it has {', '.join(_OPTIONS)}")
        count = len(self.questions)
        self.question_index = int(_given(given, "question", lambda: self.np_random.integers(count)))
        if not 0 <= self.question_index < count:
            raise ValueError(f"there is no question {self.question_index}; give 0 to {count - 1}")
        self.policy_cost = PolicyCost(given.get("policy_cost") or self.settings.policy_cost)
        token_seed = int(_given(given, "token_seed", lambda: self.np_random.integers(_SEEDS)))
        encoded = self.encoded[self.question_index]
        rule = TokenRule(
            self.settings.max_new_tokens, self._end_ids, self.settings.temperature, token_seed
        )
        start = GatedSequence.after_prompt(self.model, encoded.prompt_ids, self.settings.never_skip)
        self._episode = DecodeEpisode.begin(encoded, rule, start)
        self._paid, self._truncated, self._self_dense_N = 0.0, False, None
        sizes = {
            "prompt_tokens": len(encoded.prompt_ids),
            "gold_tokens": len(encoded.answer_ids),
            "token_seed": token_seed,
        }
        return self._observe(), self._info() | sizes

    def step(self, action: Action) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Feed the next token with these skips.

        Raises ValueError for an action outside the space, ResetNeeded before a reset and after the end.
        """
        episode = self._running()
        wanted = np.asarray(action)
        layers = self.model.config.layer_count
        if wanted.shape != (layers,) or not np.isin(wanted, (0, 1)).all():
            raise ValueError(f"an action is {layers} numbers of 0 and 1, got {action!r}")
        executed_L = torch.from_numpy(wanted.astype(bool))
        executed_L[list(self.forced)] = False
        episode.advance(executed_L)
        limit = self.settings.max_steps
        self._truncated = not episode.finished and limit is not None and episode.columns >= limit
        executed = executed_L.numpy().astype(np.int8)
        info = self._info() | {
            "executed": executed,
            "overruled": np.flatnonzero(wanted.astype(np.int8) != executed),
        }
        if episode.finished:
            info |= self._summary()
        return self._observe(), self._reward(), episode.finished, self._truncated, info

    def render(self) -> str | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Both phases so far, each token shaded by how many layers it skipped."""
        if self.render_mode is None or self._episode is None:
            return None
        episode = self._episode
        traces = episode.done if episode.finished else [*episode.done, episode.trace()]
        return "\n".join(f"{trace.kind}: {self._shaded(trace)}" for trace in traces)

    # --- for agents and callers -------------------------------------------------------------------

    def own_gate(
        self, mode: GateMode = GateMode.THRESHOLD, tau: float | None = None, seed: int = 0
    ) -> Action:
        """What the model's own gates would skip for the token that is fed next; the episode stays as it is.

        It costs a step on a copy of the cache. Set reset's policy_cost to "gates" so that gates are counted.
        """
        episode = self._running()
        skip_L, _ = episode.current.own_decision(episode.next_token, mode, tau, seed)
        return skip_L.numpy().astype(np.int8)

    @property
    def traces(self) -> tuple[SegmentTrace, ...]:
        """Of the phases that are over, the decode phase's first."""
        return () if self._episode is None else tuple(self._episode.done)

    def outcomes(self) -> tuple[SegmentOutcome, ...]:
        """Both segments of a finished episode, as the reward reads them."""
        if self._episode is None or not self._episode.finished:
            raise ValueError(
                "the episode is not finished; its outcome is known after its last step"
            )
        dense = (self._dense_of_self(), self._dense_of_gold())
        pairs = zip(self._episode.done, dense, strict=True)
        return tuple(
            segment_outcome(self.model.config, trace, nll_N, self.policy_cost)
            for trace, nll_N in pairs
        )

    def episode_reward(self) -> EpisodeReward:
        """R of a finished episode with its terms and shares."""
        return episode_reward(self.outcomes(), self.settings.reward)

    # --- inside -----------------------------------------------------------------------------------

    def _running(self) -> DecodeEpisode:
        episode = self._episode
        if episode is None or episode.finished or self._truncated:
            raise gymnasium.error.ResetNeeded("no episode is running; call reset()")
        return episode

    def _reward(self) -> float:
        """What this column is paid; the last one gets the rest of R."""
        episode = self._episode
        assert episode is not None
        if episode.finished:
            total = self.episode_reward().total
        elif self.settings.reward_at is RewardAt.TOKEN:
            over = self._dense_of_self() if episode.done else None
            total = heading_for(
                episode, self.settings, self.policy_cost, over, self._dense_of_gold()
            )
        else:
            return 0.0
        paid, self._paid = self._paid, total
        return total - paid

    def _dense_of_self(self) -> Tensor:
        episode = self._episode
        assert episode is not None
        if self._self_dense_N is None:
            tokens = episode.done[0].token_ids
            self._self_dense_N = dense_nll(self.model, episode.encoded.prompt_ids, tokens)
        return self._self_dense_N

    def _dense_of_gold(self) -> Tensor:
        """Made once for each question: neither the agent nor the continuation changes it."""
        index, encoded = self.question_index, self.encoded[self.question_index]
        if index not in self._gold_dense:
            self._gold_dense[index] = dense_nll(self.model, encoded.prompt_ids, encoded.answer_ids)
        return self._gold_dense[index]

    def _observe(self) -> Observation:
        episode = self._episode
        assert episode is not None
        skips = episode.current.skips
        return observe(
            self.observation_space,
            self._projection_Sd,
            episode.current.reading,
            episode.next_token,
            episode.phase,
            episode.progress,
            skips[-1] if skips else None,
        )

    def _info(self) -> dict[str, Any]:
        episode = self._episode
        assert episode is not None
        return {
            "question": self.questions[self.question_index].id,
            "phase": str(episode.phase),
            "column": episode.columns,
        }

    def _summary(self) -> dict[str, Any]:
        """What the last info adds."""
        assert self._episode is not None
        reward, weights = self.episode_reward(), self.settings.reward
        made = self._episode.done[0]
        return {
            "reward_terms": {
                "compute_saved": reward.compute_saved_frac,
                "nll_increase": reward.nll_increase,
                "beta": weights.beta,
                "lam": weights.lam,
                "compute_term": reward.compute_term,
                "quality_term": reward.quality_term,
                "total": reward.total,
            },
            "reward_shares": {
                str(trace.kind): shares_T.numpy()
                for trace, shares_T in zip(self._episode.done, reward.shares, strict=True)
            },
            "stop": "eos" if made.token_ids[-1] in self._end_ids else "length",
        }

    def _shaded(self, trace: SegmentTrace) -> str:
        joiner = PieceJoiner(lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True))
        skipped = [*trace.skip_LT.sum(0).tolist(), None]
        pieces = [joiner.push(token, n) for token, n in zip(trace.token_ids, skipped, strict=True)]
        layers = self.model.config.layer_count
        shown = [piece for piece in [*pieces, joiner.flush()] if piece is not None]
        return "".join(shade(piece, layers, ColorSystem.TRUECOLOR) for piece in shown)


def _given(options: Mapping[str, Any], name: str, draw: Callable[[], Any]) -> Any:
    value = options.get(name)
    return draw() if value is None else value
