import os
import sys

import raysearch

if sys.path[0] in ("", os.getcwd()) and os.path.dirname(raysearch.__path__[0]) != os.getcwd():
    sys.path.append(sys.path.pop(0))  # `python -m` puts the current folder first: a module of the user's would stand for ours

from raysearch.cli import main

main()
