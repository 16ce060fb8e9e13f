"""FBS inside vLLM: the model, per-request gates, traces, gate updates. Imports vLLM; nothing below it does."""
