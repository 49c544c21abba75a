"""Measures of pictures, and where their weights come from."""
