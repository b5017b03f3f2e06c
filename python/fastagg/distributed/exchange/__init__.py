"""What ranks exchange, and its arithmetic."""
