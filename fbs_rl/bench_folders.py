"""One backbone written twice for vLLM engines that are to be compared: as it is, and as an FBS model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fbs_rl.model.modeling import FBSForCausalLM

PLAIN, FBS = "plain", "fbs"
"""Names of the two folders."""


def savable(backbone: PreTrainedModel) -> PreTrainedModel:
    """The backbone, or a copy of one read from GGUF, which transformers refuses to save."""
    if not hasattr(backbone.config, "quantization_config"):
        return backbone
    config: Any = copy.deepcopy(backbone.config)
    del config.quantization_config
    plain: Any = type(backbone)(config)
    plain.to(backbone.device, backbone.dtype)
    plain.load_state_dict(backbone.state_dict())
    return plain.eval()


def write_folders(folder: Path, backbone: PreTrainedModel, model: FBSForCausalLM) -> int:
    """Writes both; bytes of the larger one's weights. backbone: see savable."""
    backbone.save_pretrained(folder / PLAIN)
    model.save_pretrained(folder / FBS)
    return sum(path.stat().st_size for path in (folder / FBS).glob("*.safetensors"))
