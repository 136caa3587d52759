"""Lightning modules and data modules for causal language models."""
