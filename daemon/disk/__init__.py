"""The disk: the only place that makes bytes durable, and where tests make it fail."""
