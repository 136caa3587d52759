"""How a strategy spreads the tensors of a model over the processes of a run; one module per strategy."""
