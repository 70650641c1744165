"""Sharing: weights of a run with their card in ``models``, and the bundle as one file."""
