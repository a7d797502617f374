"""What is measured and told, and changes nothing."""
