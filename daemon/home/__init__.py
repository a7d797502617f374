"""A home as a whole: founded, stood on, recovered, watched over and checked."""
