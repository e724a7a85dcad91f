"""Programs that nobody has read are run here: without network, files, environment, and with bounded time and memory.

run.py      starts a sandbox and ends it
launch.py   makes the namespaces, in a process of its own
functions.py, asserts.py   the two programs that run an answer's functions, and the tests that call them
values.py   how plain values pass between the two
"""
