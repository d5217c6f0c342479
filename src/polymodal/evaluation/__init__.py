"""Scoring models on held-out questions."""
