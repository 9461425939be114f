"""``python -m lampctl`` is ``lampctl``."""

from lampctl.app import main

main()
