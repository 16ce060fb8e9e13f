"""Worker classes that vLLM starts by name; imported in its worker processes only."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from fbs_rl.serving.runner import with_sessions

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as _Worker
else:
    from vllm.v1.worker.gpu_worker import Worker as _Worker


class FBSWorker(_Worker):  # pyright: ignore[reportGeneralTypeIssues]
    """The platform's worker, whose runner plans FBS requests."""

    def init_device(self) -> None:
        super().init_device()
        runner: Any = self.model_runner
        with_sessions(runner)

    def compile_or_warm_up_model(self) -> Any:
        """After this the engine takes requests."""
        made = super().compile_or_warm_up_model()
        served: Any = self.model_runner.get_model()
        served.model.prepare(served.lm_head.weight)
        return made
