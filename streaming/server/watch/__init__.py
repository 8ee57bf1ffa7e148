"""What an operator sees: health, metrics, the log."""
