from pathlib import Path

import pytest
import yaml

from selfplay import config
from selfplay.errors import ConfigError

CONFIGS = Path(__file__).parents[2] / "configs"
TINY = CONFIGS / "tiny.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_config_loads(path):
    loaded = config.load(path)
    assert loaded.train.accelerate is None or (CONFIGS.parent / loaded.train.accelerate).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted((CONFIGS / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_accelerate_config_is_one_that_accelerate_reads(path):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(path)).num_processes == yaml.safe_load(path.read_text())["num_processes"]


def test_every_field_has_a_line_of_docs():
    """Every section that the schema can hold, those in lists and optional ones too."""

    def sections(section):
        for below in section.__subclasses__():
            yield below
            yield from sections(below)

    found = set(sections(config.Section))
    assert {config.Config, config.LoraConfig, config.MemberConfig, config.Limits} <= found
    assert [f"{s.__name__}.{n}" for s in found for n, field in s.model_fields.items() if not field.description] == []


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
        ("train.micro_batch_pairs=5", "train: batch_pairs 16 is not a multiple of micro_batch_pairs 5"),
        ("prompts.max_tokens=999", "training never truncates"),
        ("generate.engine.max_model_len=10", "more than generate.engine.max_model_len"),
        ("reward.url=[http://x]", "reward: give exactly one of"),
        ("evaluate.judge={}", "evaluate.judge: give exactly one of"),
        ("reward.ensemble={members: [{model: a/b}, {model: a/c}]}", "reward: give exactly one of"),
        ("evaluate.judge={ensemble: {members: [{model: a/b}]}}", "members: List should have at least 2"),
        ("evaluate.judge={ensemble: {members: [{model: a/b}, {model: a/c, name: '0'}]}}", "two members are called '0'"),
        ("evaluate.judge={ensemble: {members: [{model: a/b}, {}]}}", "members.1: give exactly one of"),
        ("evaluate.judge={model: .cache/tiny/current/reward}", "evaluate.judge is a reward that trains"),
        ("evaluate.judge={url: ['http://u:secret@h:1']}", "the url of h holds a user, a password"),
        ("evaluate.judge={url: ['h:1']}", "'h:1' is no address"),
        ("evaluate.judge={chat_judge: {model: m, url: ['http://h:1/?key=x']}}", "the url of h holds"),
        ("evaluate.judge={model: a/b, api_key_env: K}", "`api_key_env` belongs to a `url`"),
        ("evaluate.judge={url: ['http://h:1'], trust_remote_code: true}", "`trust_remote_code` belongs to a `model`"),
        ("evaluate.judge={model: a/b, identity: mine}", "`identity` belongs to a `url`"),
        ("reward={url: ['http://h:1'], chat_template_kwargs: {a: 1}}", "belongs to a `model` or a `tokenizer`"),
        ("policy.chat_template_kwargs={tokenize: false}", "tokenize cannot be given to a chat template"),
        ("policy.chat_template_kwargs={day: 2024-07-26}", "policy.chat_template_kwargs.day: "),
        ("policy.thinking={start: ''}", "policy.thinking.start: "),
        ("evaluate.judge={model: .cache/tiny/current/reward, chat_template_kwargs: {a: 1}}", "is a reward that trains"),
        ("guard.gold_drop={stop: 0.1}", "guard: gold_drop may warn and has no `stop`"),
        ("pairs.max_disagreement=1", "goes with reward.ensemble"),
        ("reward.shaping={cut_off_penalty: 1}", "goes with pairs.cut_off: reject"),
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


def test_what_decides_on_the_ids_of_prompts_is_fixed_for_a_run():
    """None where nothing is set, as it is in the ledger of a run that began before there were such settings."""
    plain = config.load(TINY).fixed()
    assert (plain["policy.chat_template_kwargs"], plain["policy.template_date"]) == (None, None)
    given = config.load(
        TINY, ["policy.chat_template_kwargs={enable_thinking: false}", "policy.template_date=2024-02-29"]
    )
    assert given.fixed() == plain | {
        "policy.chat_template_kwargs": {"enable_thinking": False},
        "policy.template_date": "2024-02-29",
    }
    assert config.load(TINY, ["policy.thinking={}"]).fixed() == plain


def test_implicit_rewards_of_dpo_want_a_reference_that_does_not_sample():
    for reference in ("previous", "{every: 1}"):
        with pytest.raises(ConfigError, match="every implicit reward is 0"):
            config.load(TINY, ["pairs.implicit=dpo", f"train.reference={reference}"])
    for reference in ("initial", "{every: 2}"):
        assert config.load(TINY, ["pairs.implicit=dpo", f"train.reference={reference}"]).pairs.implicit == "dpo"


@pytest.mark.parametrize("other", ["placement.colocated=true", "breadth.method=clusters"])
def test_what_cannot_be_while_the_next_round_is_sampled_is_named(other):
    with pytest.raises(ConfigError, match=f"schedule.ahead goes without {other.partition('=')[0]}"):
        config.load(TINY, ["schedule.ahead=1", other])
    assert config.load(TINY, ["schedule.ahead=1"]).schedule.ahead == 1


def test_members_and_judges_take_what_they_leave_out_from_the_reward_section():
    judge = (
        "evaluate.judge={batch: 7, ensemble: {members: [{model: a/b, timeout: 3}, {url: ['http://h:1'], dtype: auto}]}}"
    )
    loaded = config.load(TINY, ["reward.timeout=9", judge])
    assert {key: s.model for key, s in loaded.reward_sources().items()} == {"reward": ".cache/tiny/current/reward"}
    first, second = loaded.judge_sources().values()
    assert next(iter(loaded.judge_sources())) == "evaluate.judge.ensemble.members.0"
    assert (first.model, first.url, first.timeout, first.batch, first.dtype) == ("a/b", [], 3, 7, "float32")
    assert (second.model, second.url, second.timeout, second.batch, second.dtype) == (
        None,
        ["http://h:1"],
        9,
        7,
        "auto",
    )


def test_a_judge_is_another_reward_than_the_one_that_trains():
    """Whatever kind they are; the same model in another precision, and one of the same addresses, is the same."""
    rules = "{model: null, rules: [{rule: json}]}"
    chat = "{chat_judge: {url: ['http://h:1'], model: m}}"
    assert config.load(TINY, [f"reward={rules}", f"evaluate.judge={chat}"]).judge_sources()
    assert config.load(TINY, [f"reward={rules}", "evaluate.judge={rules: [{rule: json, weight: 2}]}"]).judge_sources()
    for reward, judge in (
        (rules, rules),
        ("{model: a/b}", "{model: a/b, dtype: bfloat16}"),
        ("{url: ['http://h:1', 'http://h:2']}", "{url: ['http://h:2/']}"),
        (chat, chat.replace("model: m", "model: m, timeout: 9")),
    ):
        with pytest.raises(ConfigError, match="is a reward that trains"):
            config.load(TINY, [f"reward={reward}", f"evaluate.judge={judge}"])


def test_code_of_one_model_is_not_run_for_another():
    loaded = config.load(TINY, ["reward.trust_remote_code=true"])
    assert [s.trust_remote_code for s in (*loaded.reward_sources().values(), *loaded.judge_sources().values())] == [
        True,
        False,
    ]


def test_the_column_of_the_prompt_has_a_short_form_and_old_runs_stay_the_same():
    short = config.load(TINY, ["prompts.column=question"])
    assert short.prompts.columns == config.load(TINY, ["prompts.columns={prompt: question}"]).prompts.columns
    assert short.fixed()["prompts.column"] == "question"
    new = {"prompts.columns", "prompts.format", "prompts.config", "prompts.filter", "prompts.column"}
    assert {config.load(TINY).fixed()[name] for name in new} == {None}
    with pytest.raises(ConfigError, match="prompts.format: should be 'tree', .* or 'lines', not 'alpacca'"):
        config.load(TINY, ["prompts.format=alpacca"])
