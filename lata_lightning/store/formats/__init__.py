"""The kinds of files and directories that weights are read from, one module for each."""
