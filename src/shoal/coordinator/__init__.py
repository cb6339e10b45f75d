"""The run's control process: what to act on, who acts, what is good enough to train on, what has been published.

`tasks` draws groups; `control` decides (leases, queue, evaluation, batches: no I/O but its journal); `verification`
checks what workers claim; `service` is the control's face on the fabric; `journal` and `rundir` keep everything that
a killed run needs to go on; `processes` starts and ends the learner and local workers; `reporting` shows what
happened. Torch is not imported here.
"""
