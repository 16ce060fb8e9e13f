"""Stage 2: questions, rewards, advantages, the PPO loss. Functions of tensors; the cluster is in actors/."""
