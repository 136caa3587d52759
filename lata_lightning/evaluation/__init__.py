"""Scoring models, choosing the scale on validation data, unlearning, disentanglement and continual learning."""
