"""Tables for the terminal, charts as plain data, and pictures."""
