"""What `mainstem demo` merges: a small network and its experts, trained on the spot on real images."""
