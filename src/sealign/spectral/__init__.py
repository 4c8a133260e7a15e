"""The spectral method on tensors: feature maps, cross-covariances, decomposition, signature, projection."""
