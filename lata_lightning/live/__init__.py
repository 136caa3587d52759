"""A model in training: its start weights, its present weights and how they are spread over processes; no Lightning in here."""
