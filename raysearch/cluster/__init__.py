"""The Ray cluster: joining it, what fits it, how a sweep ends on it."""
