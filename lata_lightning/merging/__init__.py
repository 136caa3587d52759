"""Merging: vectors matched with the model they are added to, weighted, and summed, to disk or in memory."""
