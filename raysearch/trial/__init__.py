"""One trial: actions, rounds, candidates, and the gang of processes that runs them."""
