"""What stands in a script's sandbox: the Python interface to the chain, and the starters of both languages."""
