"""The method TADSR in plain torch: schedule, Time-Aware Encoder, weights, geometry, colour."""
