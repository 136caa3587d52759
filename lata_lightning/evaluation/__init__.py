"""Scores of a model: exact match and perplexity."""
