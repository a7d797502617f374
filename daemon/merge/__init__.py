"""The publish protocol: from a settled arrival to a version that everyone sees."""
