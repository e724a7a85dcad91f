from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from selfplay.errors import InputError
from selfplay.training.launch import Launch, read

FILES = Path(__file__).parents[2] / "configs" / "accelerate"


def test_the_shipped_files() -> None:
    expected = {"single.yaml": (1, 1), "fsdp2-4.yaml": (4, 4), "fsdp2-8.yaml": (8, 8)}
    assert {path.name for path in FILES.iterdir()} == expected.keys()
    for name, (processes, shares) in expected.items():
        assert read(FILES / name) == Launch(processes=processes, shares=shares)
        assert load_config_from_file(str(FILES / name)).num_processes == processes, "accelerate takes it too"
    assert read(None) == Launch(processes=1, shares=1)


def test_without_fsdp_each_process_holds_the_whole_model(tmp_path: Path) -> None:
    path = tmp_path / "ddp.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "MULTI_GPU", "num_machines": 1, "num_processes": 2}))
    assert read(path) == Launch(processes=2, shares=1)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"distributed_type": "MULTI_CPU"}, "num_processes is 4, but for distributed_type MULTI_CPU one process"),
        ({"distributed_type": "NO"}, "num_processes is 4, but for distributed_type NO one process"),
        ({"num_processes": "many"}, "num_processes is 'many'"),
        ({"num_processes": 0}, "num_processes is 0"),
        ({"num_machines": 2}, "num_machines is 2"),
        ({"fsdp_config": {"fsdp_version": 1}}, "fsdp_version is 1"),
        ({"fsdp_config": None}, "fsdp_version is 1"),
    ],
)
def test_files_that_would_start_something_else(tmp_path: Path, settings: dict[str, Any], words: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((FILES / "fsdp2-4.yaml").read_text()) | settings))
    with pytest.raises(InputError, match=words) as error:
        read(path)
    assert error.value.exit_code == 2 and error.value.hint and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [(None, "no such file"), ("- 4", "not a configuration"), ("a: [", "not YAML")]
)
def test_files_that_are_none(tmp_path: Path, text: str | None, words: str) -> None:
    path = tmp_path / "file.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        read(path)
