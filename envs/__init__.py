"""Gymnasium environments: decoding as an episode of skip decisions. Importing this registers fbs_rl/Decode-v0."""

import gymnasium

# No max_episode_steps: an episode has at most max_new_tokens - 1 columns and those of its gold answer.
gymnasium.register(
    id="fbs_rl/Decode-v0",
    entry_point="envs.decode_env:DecodeEnv",
    vector_entry_point="envs.vector_env:FleetVectorEnv",
)
