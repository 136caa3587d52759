"""One HTML page with figures and facts about runs and task vectors, which loads nothing from the network."""
