"""One module, one study: STUDY holds what is fixed, space(trial) what varies. See demo.py."""
