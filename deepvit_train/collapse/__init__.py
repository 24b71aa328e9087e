"""Measure attention collapse in any vision transformer, and show it in figures and a report."""
