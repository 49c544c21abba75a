"""Training of TADSR: data, degradation, losses, loop. Imports `tadsr`, never `nodes`."""
