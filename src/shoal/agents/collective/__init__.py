"""A collective: agents that solve problems together, with nobody in charge (Symphony, arXiv 2508.20019).

    answers      one form for answers that mean the same                       pure
    work         what is asked of a model: experts and writers                 seams
    market       beacons, offers, choice                                       over the fabric
    executor     taking, doing and handing over steps                          over the fabric
    chain        one chain's steps, and who holds them                         pure
    chains       leases of the chains that this node wrote                     over the fabric
    patience     how long answers are waited for                               pure, and over the fabric
    commissions  writing chains for others                                     over the fabric
    posing       planners, weights, vote                                       over the fabric
    sharing      one ledger for all                                            over the fabric
    node         all of it, for one node
    model, policies, experts    who does steps and writes chains: models with adapters, endpoints, agents with tools
    life         a node joined by ticket
    episodes, environment       what was done, kept and learnt again
    problems     problems of two skills, to learn and measure
    baselines    what all this is compared with

What everybody knows of everybody is `swarm.ledger`; what that is worth, and how it decides, is `planning.skills` and
`planning.selection`.
"""
