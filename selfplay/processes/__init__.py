"""Child processes: guarded, logged, spoken to in JSON lines, and never left behind.

The controller starts each child under a small guard process, so the tree is

    controller ─ guard ─ child ─ (the trainers of a launcher, engine cores, …)

`child` is the controller's side of one child, `children` is all of them together, and `pipe` carries the lines between
the two. `protocol` is the child's own side, `guard` is the process between them, `reaping` ends what an earlier
controller left behind, and `logs` keeps log files short.
"""
