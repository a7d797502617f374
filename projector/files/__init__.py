"""safetensors files on descriptors, and the task vectors that are read from them."""
