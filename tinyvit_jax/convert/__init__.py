"""Weights to and from PyTorch key layouts, in numpy; torch is imported only to read its files."""
