"""How linear a model's modules are along a task vector, and the coefficients that follow from it in closed form."""
