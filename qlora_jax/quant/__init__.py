"""Weights as they are stored."""
