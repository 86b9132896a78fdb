"""Experiments on real imbalanced data, behind the notebooks and `python -m focaljax.lab`."""
