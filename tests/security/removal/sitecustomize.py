"""Python runs this as it starts, where this folder is on its path: processes that a test starts are undefended too."""

import os

if "SHOAL_UNDEFENDED" in os.environ:
    import undefended

    undefended.remove(os.environ["SHOAL_UNDEFENDED"])
