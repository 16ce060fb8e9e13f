"""What the quickstart leaves behind and what it says about it."""

from __future__ import annotations

from typing import Any

from fbs_rl.quickstart.request import Request
from fbs_rl.quickstart.stage2 import episodes
from fbs_rl.skip_comparison import SkipComparison


def summarise(
    request: Request, comparison: SkipComparison, found: dict[str, Any], seconds: float
) -> None:
    """Write summary.json of the whole run. found: Stage 2's."""
    request.run.summarise(
        {
            "taus": {str(ratio): tau for ratio, tau in comparison.taus.items()},
            "steps": request.stage1.phases.steps,
            "trained_tokens": request.trained_tokens,
            "updates": request.stage2.steps,
            "episodes": episodes(request.stage2),
            "tau": found["tau"],
            "questions": {when: found[when] for when in ("before", "after")},
            "seconds": round(seconds, 1),
        }
    )


def reading(request: Request, comparison: SkipComparison, found: dict[str, Any]) -> str:
    """How to read the two tables, and where to go on."""
    folder, texts, reward = request.run.path, comparison.texts, request.stage2.learner.reward
    windows = len(next(iter(texts.heldout.values())))
    before, after = found["before"]["eval/reward"], found["after"]["eval/reward"]
    questions = found["after"]["eval/questions"]
    return (
        f"Perplexity (lower is better) is of tokens {texts.decode_start} to {request.options.length} of {windows} "
        f"windows a language. Stage 1 fitted on {texts.fit_NT.numel():,} tokens and trained on "
        f"{request.trained_tokens:,}. Fixed and random skipping use the same model, which was not trained for them.\n"
        f"The reward of Stage 2 is {reward.beta} x compute saved - {reward.lam} x likelihood lost, mean of {questions} "
        f"questions: it went from {before:+.4f} to {after:+.4f} (never skipping gives 0).\n"
        f"One seed and minutes of training: this shows that the parts work together, not what FBS can do; expect "
        f"noise.\n"
        f"In {folder}:\n"
        f"  final/             Hugging Face folder with the gates of Stage 2 and their threshold "
        f"(vllm serve {folder}/final)\n"
        f"  stage1/, stage2/   the runs: settings, metrics.jsonl, checkpoints\n"
        f"  stage2/pictures/   reward and its terms, skips by layer, gate probabilities"
    )
