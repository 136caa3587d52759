"""The published setting on checkpoints that are given: merges of them streamed from disk, on models of any size."""
