"""python -m fbs_rl.quickstart (`make run`): SmolLM2-135M becomes an FBS model, learns to skip, and is measured.

1. Text that the project ships, English and Chinese, becomes shards.
2. Skip adapters and gates are fitted to a few windows of it in closed form: a start for training.
3. Stage 1 trains for a few small steps, through the same path as a large run (Ray, DeepSpeed).
4. Held-out perplexity: dense, gated before and after training, and two baselines.
5. Stage 2 trains the gates by PPO: vLLM engines answer exam questions and really skip; the reward is
   compute saved against likelihood lost.
6. The final model writes a few words, beside itself without skipping.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from collections.abc import Sequence

import torch
from rich.console import Console

from fbs_rl import generate
from fbs_rl.checkpoint import load_model
from fbs_rl.model.configuration import FBSConfig
from fbs_rl.ppo_options import make_plan
from fbs_rl.quickstart import closing, stage1, stage2
from fbs_rl.quickstart.request import read_request
from fbs_rl.skip_comparison import SkipComparison

_PROMPT, _WORDS = "Why is the sky blue?", 24


def main(argv: Sequence[str] | None = None) -> int:
    console, started = Console(stderr=False, highlight=False), time.monotonic()
    try:
        request = read_request(argv, __doc__ or "")
        options = request.options
        console.print(f"Reading {options.model} ...")
        fbs = FBSConfig.preset(options.preset)
        loaded = load_model(options.model, fbs=fbs, dtype=torch.float32)
        texts = stage1.read_texts(loaded, options.sequences, options.length)
        make_plan(request.stage2, loaded.tokenizer)
    except (ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 2
    if options.device == "cpu":
        # transformers looks for DeepSpeed, which would warn that it found no GPU.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    run, comparison = request.run, SkipComparison(texts, console)
    run.open("quickstart", vars(options))
    order = stage1.before_training(request, loaded, comparison)
    del loaded
    gc.collect()
    if code := stage1.train(request):
        return code
    stage1.after_training(request, comparison, order)
    if code := stage2.train(request):
        return code
    stage2.after_training(request, comparison)
    comparison.record(run)
    found = stage2.outcome(request)
    closing.summarise(request, comparison, found, time.monotonic() - started)
    console.print(f'6. It writes: python -m fbs_rl.generate {run.path}/final --prompt "{_PROMPT}"')
    words = [f"{run.path}/final", "--prompt", _PROMPT, "--max-new-tokens", str(_WORDS)]
    code = generate.main([*words, "--compare-dense", "--device", options.device])
    console.print(comparison.table())
    console.print(stage2.table(found))
    console.print(closing.reading(request, comparison, found), soft_wrap=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
