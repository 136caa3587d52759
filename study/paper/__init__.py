"""The published setting on real checkpoints: ready configurations, and a runner that streams every merge from disk."""
