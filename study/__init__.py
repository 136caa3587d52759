"""Evidence: which way of merging, forgetting and continual learning keeps how much, with every model trained anew for every seed."""
