"""Models whose files hold codes and scales in the place of weights: dequantized once into the user's cache."""
