"""Attention collapse: measures on tensors, collected from any vision transformer, as figures and a report."""
