"""What `lata quickstart` trains on and with: exercises, raw text, checkpoints and experts."""
