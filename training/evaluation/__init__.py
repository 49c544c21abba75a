"""Test sets, and what is written about them."""
