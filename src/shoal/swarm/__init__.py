"""Who is here, what they can do, and what they may do.

    signing   records to signed bytes and back                     pure
    grants    which key may act in which role                      pure
    invites   join secrets: single-use, expiring                   pure
    rate      how much one sender, or all strangers, may send      pure
    roster    merging signed records into one view                 pure
    keyfile   secrets on disk, for their owner only
    measure   delay and rates between nodes                        over the fabric
    pace      how often nodes tell and compare                     pure
    exchange  two nodes comparing notes                            over the fabric
    gossip    spreading records until everybody knows them         over the fabric
    member    one node's whole part in it                          over the fabric

Nobody is special for reading the roster: every node keeps it whole and any node can answer for it. One key is special
for writing: the run's root (the coordinator's identity), which signs grants and revocations.

Invariants: nothing is believed because of who passed it on, only because of who signed it; a node that says two
things under one sequence number is refused by all who learn of both; every table is bounded, and what nobody vouches
for never displaces what the root granted.
"""
