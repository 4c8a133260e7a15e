"""Fitting: activations collected from demonstrations, by one process or several."""
