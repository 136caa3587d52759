"""`lata quickstart`: its exercises, raw text, checkpoints, experts and results."""
