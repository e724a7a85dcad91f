"""A program for the sandbox: runs the code of an answer, then calls its functions as it is asked to.

Arguments: descriptors of the code, of the calls and of the replies, each call and each reply a line. Whatever the code does
to this process, all it can do is to reply with values, which are then compared elsewhere.
"""

import json
import os
import sys
import types

from reward.sandbox.values import dumps, loads


def main() -> None:
    code, calls, replies = map(int, sys.argv[1:4])
    os.dup2(os.open("/dev/null", os.O_WRONLY), 1)  # nobody reads what it prints
    module = types.ModuleType("answer")
    sys.modules["answer"] = module  # dataclasses look there
    with os.fdopen(code, encoding="utf-8") as file:
        exec(compile(file.read(), "answer.py", "exec"), module.__dict__)
    out = os.fdopen(replies, "w", encoding="utf-8")
    names = [name for name, value in module.__dict__.items() if callable(value)]
    print(json.dumps(names), file=out, flush=True)
    for line in os.fdopen(calls, encoding="utf-8"):
        name, arguments, keywords = loads(line)
        try:
            value = dumps(getattr(module, name)(*arguments, **keywords))
            reply = {"value": value, "arguments": dumps([a if _is_mutable(a) else None for a in arguments])}
        except Exception as error:
            reply = {"raised": type(error).__name__, "message": str(error)[:200]}
        print(json.dumps(reply), file=out, flush=True)


def _is_mutable(value: object) -> bool:
    return isinstance(value, (list, dict, set))


main()
