"""The operator's view: health, metrics, the log."""
