"""The console: pages about runs, agents, memories and a server, for people, in any browser, without other servers.

    files of runs ─ tail ─▶ runs      ─┐
    the scheduler's log ──▶ agents     ├─ views ─▶ HTML ─ app ─▶ browser ◀─ live: "this has changed" (SSE)
    the memory store ─────▶ memories   │
    RunStatus, /metrics ──▶ asked      ─┘

The life of a page: `door` asks for a key where there are keys; `app` finds the view; on the reader's thread (`reader`)
the sources read on from where they were, and the view writes HTML of what they know; `live` tells open pages which
topics have changed since, and the page's script asks for the parts of those again. The playground talks to a model
through OpenAI's API (`voices`).

Invariants: reading is incremental and bounded in memory and in time, however large a run is; a file, a log and a store
are only read; every text that comes from elsewhere is escaped where it enters HTML (`coordinator.reporting.markup`);
pages refer to nothing outside this server, and run no script but its own.
"""
