"""GAIA (Mialon et al., arXiv 2311.12983): questions for assistants with tools, answered by one short text each.

`dataset` reads and writes the public layout, `scorer` compares answers, `evaluation` has questions answered by runs.
"""
