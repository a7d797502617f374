"""Which tensor of an expert stands for which of the base."""
