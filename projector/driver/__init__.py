"""Streams an expert through every head: steps, workers, devices."""
