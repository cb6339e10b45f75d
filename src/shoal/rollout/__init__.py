"""Acting: one episode (`episode`), the policy a worker acts with (`policy`), and the worker (`worker`).

A worker leases a group of tasks, makes sure that it holds the policy version the lease asks for, drives sampler and
environment, and submits the episodes whole. It trusts the coordinator that its ticket names, and weights only if they
are on the chain that the run's learner signed. Whatever fails on its side is `void`, never reward 0.
"""
