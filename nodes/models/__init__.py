"""What is loaded: weights, base, student, encoder."""
