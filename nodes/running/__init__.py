"""What happens to a picture: stages, plan, run, colour, progress."""
