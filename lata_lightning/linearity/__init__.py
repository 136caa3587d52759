"""Running a model over samples block by block: non-linearity scores, coefficients in closed form, and regression merges with and without samples."""
