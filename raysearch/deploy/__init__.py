"""From a candidate to a deployment folder, and back."""
