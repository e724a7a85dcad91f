"""A program for the sandbox: runs the code of an answer as a program. Argument: the descriptor of the code."""

import os
import sys

code = int(sys.argv[1])
sys.argv = ["answer.py"]
with os.fdopen(code, encoding="utf-8") as file:
    source = file.read()
exec(compile(source, "answer.py", "exec"), {"__name__": "__main__"})
