"""The pruning mathematics: tensors and numbers in, tensors out; no module, no config, no I/O, no ray."""
