"""The comparison on pre-trained weights: fine-tunes of a real model, merged, forgotten and learned in sequence, and an encoder with two heads."""
