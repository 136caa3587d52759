"""Merging: matching vectors with the model they are added to, weighting them, and summing, to disk or in memory."""
