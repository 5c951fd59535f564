"""Evaluation reports: one HTML file that needs nothing else, and the same numbers as Markdown."""
