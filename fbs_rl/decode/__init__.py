"""Decoding beside the model: what guards a text while it is made. Imports neither Ray nor an engine."""
