"""Figures and facts about runs and task vectors in one page that needs no network."""
