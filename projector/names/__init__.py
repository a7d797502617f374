"""What the names of tensors say: how an expert's become the base's, what is derived, what is quantised."""
