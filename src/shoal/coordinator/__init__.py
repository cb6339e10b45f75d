"""The run's control process: what to act on, who acts, what is good enough to train on, what has been published.

`tasks` draws groups; `control` decides (leases, queue, batches: no I/O but its journal); `evaluation` hands out
held-out questions; `verification` checks what workers claim; `service` is the control's face on the fabric; `journal`,
`consumption` and `rundir` keep everything that a killed run needs to go on; `processes` starts and ends the learner and
local workers; `summary` and `reporting` say what happened. Torch is not imported here.
"""
