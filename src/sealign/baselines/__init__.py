"""The methods that spectral editing is compared with, behind one interface."""
