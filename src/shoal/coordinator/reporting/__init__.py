"""What a run looked like, for people: its record read from disk, plots, and one self-contained page.

`record` reads a run's folder, whatever state it is in; `plots` draws it; `page` (with `markup` and `page.css`) writes
`report.html`; `paired` says how sure a gain is. Only files are read: a report can be made of a run that is still going
on, has crashed, or came from another machine.
"""
