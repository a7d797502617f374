"""A checkpoint as somebody else left it: found in its folder, opened by descriptor, read and never written."""
