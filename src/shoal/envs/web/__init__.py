"""The web as a world: a real browser, pages read as accessibility trees, and sites that are seeded and judged by state.

`browser` owns the one browser process of this process, `tab` is one isolated page in it, `gate` its only way to a
network; `tree` is what an agent sees of a page, `actions` what it can do; `miniwob` and `sites` are what there is to
do, and `environment` puts them together. Importing it needs no browser (the extra `web` brings what drives one).
"""
