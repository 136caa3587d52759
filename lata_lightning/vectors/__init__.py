"""Task vectors: the lazy mapping, its manifest, and what is measured on it or made from it."""
