"""The FBS model. Importing this package registers it with transformers' Auto classes."""

from fbs_rl.model.configuration import FBSConfig
from fbs_rl.model.kv_cache import FBSCache
from fbs_rl.model.modeling import FBSForCausalLM

__all__ = ["FBSCache", "FBSConfig", "FBSForCausalLM"]
