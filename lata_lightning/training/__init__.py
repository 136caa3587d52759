"""Lightning modules and data modules, the body of `lata fit`, and learning tasks in sequence."""
