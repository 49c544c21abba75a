"""What the networks learn: losses, timesteps, and one micro batch of each."""
