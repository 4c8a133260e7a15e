"""Numerical core: feature maps, cross-covariance, truncated decomposition, signature and projection of tensors."""
