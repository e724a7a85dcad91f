"""The children of a run on the nodes of a Ray cluster.

    controller ─ (Ray) ─ actor ─ guard ─ child ─ …        on whichever node has room

`host` is the actor: it starts a child on its node, under the guard, and hands bytes of its pipes on. `hosted` is the
controller's side of it: to `processes.child.Child` it looks like a process of this machine. `driver` is the only module that
imports Ray. `placing` says where the children of each role are put, and `survey` what the nodes are like.
"""
