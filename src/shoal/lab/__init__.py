"""Networks to try things on: one seeded description, a packet switch between namespaces, or relays without root.

`network` is the description. `packet.packet_lab` runs real processes in network namespaces whose only way out is a
user-space switch (needs root); `proxy.proxy_lab` shapes TCP streams between ordinary local processes. Both are a
`lab.Lab`: start processes at nodes, cut, heal, play the script, read statistics.

What decides what happens to a packet (`impairment`, `nat`, `cuts`, `switch`) is pure: no socket, no clock. Around it
are the I/O shells (`tun`, `namespaces`, `switch_process`, `packet`, `proxy`) and the lab's own yardstick (`probe`,
`measure`). This room imports no other.
"""
