from pathlib import Path

import pytest
import yaml

from selfplay import config
from selfplay.errors import ConfigError

CONFIGS = Path(__file__).parents[1] / "configs"
TINY = CONFIGS / "tiny.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    loaded = config.load(path)
    assert loaded.train.accelerate is None or (CONFIGS.parent / loaded.train.accelerate).is_file()


@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_accelerate_config_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_every_field_has_a_line_of_docs():
    def undocumented(section, path):
        for name, field in section.model_fields.items():
            if not field.description:
                yield f"{path}{name}"
            if isinstance(field.annotation, type) and issubclass(field.annotation, config.Section):
                yield from undocumented(field.annotation, f"{path}{name}.")

    assert list(undocumented(config.Config, "")) == []


def test_overrides_are_yaml_values():
    loaded = config.load(
        TINY, ["train.learning_rate=1e-5", "reward.url=[http://127.0.0.1:1]", "reward.model=null", "run.seed=7"]
    )
    assert (loaded.train.learning_rate, loaded.reward.url, loaded.run.seed) == (1e-5, ["http://127.0.0.1:1"], 7)
    assert config.load(TINY, ["train.reference={every: 3}"]).train.reference == config.EveryN(every=3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.beta=1", "trian: unknown key, did you mean train?"),
        ("train.learning_rat=1", "train.learning_rat: unknown key, did you mean train.learning_rate?"),
        ("generate.engine.max_seqs=1", "did you mean generate.engine.max_num_seqs?"),
        ("train.lora={rr: 3}", "train.lora.rr: unknown key, did you mean train.lora.r?"),
        ("train.beta=much", "train.beta: .*number.*'much'"),
        ("train.epsilon=1", "train.epsilon: .*less than 1"),
        ("train.beta=2", "train: beta 2.0 is outside"),
        ("prompts.max_tokens=999", "training never truncates"),
        ("generate.engine.max_model_len=10", "more than generate.engine.max_model_len"),
        ("reward.url=[http://x]", "reward: give exactly one of"),
        ("evaluate.judge={}", "evaluate.judge: give exactly one of"),
        ("run.name=../x", "run.name"),
        ("policy=3", "policy: "),
        ("policy.model.x=3", "model is a value, not a section"),
        ("nonsense", "not of the form"),
        ("a=[", "not YAML"),
    ],
)
def test_errors_name_the_key(override, message):
    with pytest.raises(ConfigError, match=message):
        config.load(TINY, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("a: [", "YAML"),
        ("- 1", "not a mapping"),
        ("run: {}", "policy: required"),
        (b"\xff", "cannot be read"),
    ],
)
def test_files_that_are_no_config(tmp_path, text, message):
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=message):
        config.load(path)


def test_fingerprint_follows_the_values():
    assert config.load(TINY).fingerprint() == config.load(TINY).fingerprint()
    assert config.load(TINY).fingerprint() != config.load(TINY, ["run.seed=1"]).fingerprint()


def test_implicit_rewards_of_dpo_want_a_reference_that_does_not_sample():
    for reference in ("previous", "{every: 1}"):
        with pytest.raises(ConfigError, match="every implicit reward is 0"):
            config.load(TINY, ["pairs.implicit=dpo", f"train.reference={reference}"])
    for reference in ("initial", "{every: 2}"):
        assert config.load(TINY, ["pairs.implicit=dpo", f"train.reference={reference}"]).pairs.implicit == "dpo"
