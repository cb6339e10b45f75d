"""Runs: a model decides, calls run as soon as they can, everything is an event (Gradientsys, arXiv 2507.06520).

A run's life: `policy` is shown a `View` and gives a `Decision` (`decision` says what one looks like, `prompt` how it is
asked for); `state` folds events and says which calls are ready; `runner` performs them and writes each change to the
`log` before it takes effect; `service` keeps many runs, resumes and forks them.
"""
