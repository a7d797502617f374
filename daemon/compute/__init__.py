"""Where, how wide and in how much memory to compute, and how far it is."""
