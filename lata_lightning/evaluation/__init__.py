"""Scores of a model, scales chosen by them, what was forgotten, and tasks in sequence."""
