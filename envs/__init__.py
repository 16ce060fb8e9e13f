"""Gymnasium environments: decoding as an episode of skip decisions."""
