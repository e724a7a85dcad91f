"""A policy in a repository of the Hub. `python -m selfplay.publishing.hub` is the process that uploads for a run.

The token comes from the environment alone. What `hf auth login` left in a file is not used, because a service should not
write where a person once could.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from reward import hub
from selfplay.errors import InputError, PublishError, SelfplayError
from selfplay.processes.child import PATIENT, Child, ChildDied, ChildError
from selfplay.processes.children import owning
from selfplay.processes.logs import last_line
from selfplay.processes.protocol import protocol

TOKEN = "HF_TOKEN"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")  # of an earlier policy, which may have had other shards


def require_token() -> str:
    """The token, without the line end that a file may have left. Raises InputError where there is none."""
    if not (token := os.environ.get(TOKEN, "").strip()):
        raise InputError(
            f"${TOKEN} is not set, and nothing is written to the Hub without it", f"export {TOKEN} with a write token"
        )
    return token


def upload(folder: Path, repo: str, message: str, private: bool = True) -> str:
    """Make the repository where it is missing, and upload the folder as one commit. Returns the commit's address.

    Where all files are there already there is no new commit. Raises InputError without a token, and PublishError.
    """
    token = require_token()
    hub.bounded()
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined]

    disable_progress_bars()  # they are drawn with characters that neither the terminal nor the log gets
    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        made = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, delete_patterns=list(WEIGHTS)
        )
    except Exception as error:  # of network, HTTP and Hub: classes of several libraries
        why = " ".join(str(error).replace(token, "…").split())[:500]
        hint = f"see whether {repo} is yours, ${TOKEN} may write to it, and the Hub answers"
        raise PublishError(f"{repo} did not take the policy ({type(error).__name__}: {why})", hint) from None
    return str(made.commit_url)


def upload_in_child(run_dir: Path, folder: Path, repo: str, message: str, private: bool) -> str:
    """`upload` in a process of its own, which can be ended while it hangs. Raises as it does."""
    require_token()
    log = run_dir / "logs" / "publish.log"
    child = Child(
        "publisher", [sys.executable, "-m", "selfplay.publishing.hub"], run_dir=run_dir, log=log, silence=PATIENT,
        env=owning(TOKEN),
    )  # fmt: skip
    child.start()
    try:
        found: str = child.order("upload", folder=str(folder), repo=repo, message=message, private=private)
        return found
    except ChildError as error:
        raise PublishError(str(error), error.hint) from error
    except ChildDied as error:
        raise PublishError(f"{error}: {last_line(log)}", f"its log is {log}") from error
    finally:
        child.stop()


def main() -> None:
    channel = protocol()
    channel.ready()
    for order in channel.orders():
        try:
            found = upload(Path(order["folder"]), order["repo"], order["message"], order["private"])
            channel.result(order, found)
        except SelfplayError as error:
            channel.error(order, "input", str(error), error.hint)
        except Exception as error:  # the boundary: the controller hears of whatever it is
            traceback.print_exc()
            channel.error(order, "internal", f"{type(error).__name__}: {error}", "")


if __name__ == "__main__":
    main()
