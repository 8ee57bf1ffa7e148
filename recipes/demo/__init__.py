"""The recipe of the embedded default model, `--model demo`; its weights are in `streaming/demo/voice`."""
