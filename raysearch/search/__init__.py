"""Which trial next, and the sweep that runs them."""
