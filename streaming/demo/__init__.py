"""The embedded default model, `--model demo`."""
