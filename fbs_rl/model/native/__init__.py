"""A decoding step on a CPU as one call of compiled code: the same mathematics as fbs_rl.model.step_pass, without
the hundreds of small operations that cost a CPU as much as the weights that a step reads."""
