"""Rows of data: which forms a row may have, how it becomes tokens, and where rows are read from."""
