"""The stage `guard` on rounds whose rewards are written by hand: its numbers, and what it makes of them."""

import dataclasses
import math
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from selfplay.config import GuardConfig
from selfplay.errors import CheckpointError, GuardError
from selfplay.rewards.early_signs import NAMES
from selfplay.rewards.guard import guard, measure
from selfplay.storage import folders, tables
from selfplay.storage.candidates import read_candidates, read_external, read_rewards
from selfplay.types import Candidate, Reward

LINE = SimpleNamespace(update=lambda **shown: None)


@dataclass(frozen=True, kw_only=True)
class ScoredBefore:
    """A row of scored.parquet as earlier versions wrote it, with a copy of the candidate."""

    prompt_id: str
    index: int
    text: str
    token_ids: list[int]
    logp: float
    n_tokens: int
    finish_reason: str
    policy: int
    reward: float | None
    reward_parts: dict[str, float] = field(default_factory=dict)
    reference_logp: float | None = None


def answers(count=4):
    """Four answers of 2, 3, 4, 5 tokens, two to each prompt."""
    return [
        Candidate(
            prompt_id="pq"[i // 2], index=i % 2, text="x" * i, token_ids=[*range(5, 6 + i), 2], logp=-1.0, n_tokens=2 + i,
            finish_reason="stop", policy=0,
        )
        for i in range(count)
    ]  # fmt: skip


def write_candidates(folder, rows=None):
    path = folder / "candidates.parquet"
    tables.write_rows(path, answers() if rows is None else rows, Candidate)
    return path


def write_rewards(path, rewards, *, candidates=None, **parts):
    """Rewards of the candidates (None: none), with the same parts for each, or a list of one for each."""
    rows = [
        Reward(
            prompt_id=candidate.prompt_id,
            index=candidate.index,
            reward=reward,
            reward_parts={name: v[i] if isinstance(v, list) else v for name, v in parts.items()},
        )
        for i, (candidate, reward) in enumerate(zip(candidates or answers(), rewards, strict=True))
    ]
    tables.write_rows(path, rows, Reward)
    return path


def measured(candidates, scored, *, earlier=(), past=(), noise=1e-4, cut_off="drop", window=3):
    """The signs of the reward; those of the answers are in test_early_signs.py."""
    found = measure(candidates, scored, earlier, past, noise, cut_off, window)
    return {name: value for name, value in found.items() if name not in NAMES}


class Round:
    """The stage with its settings, and what it told."""

    def __init__(self, tmp_path, rewards, **settings):
        self.out, self.settings, self.probed = tmp_path, GuardConfig.model_validate(settings), {}
        self.candidates = write_candidates(tmp_path)
        self.scored = write_rewards(tmp_path / "scored.parquet", rewards)
        self.warned, self.stopped = [], []

    def guard(self):
        return guard(
            self.out,
            LINE,
            candidates=self.candidates,
            scored=self.scored,
            earlier=[],
            past=[],
            probed=self.probed,
            settings=self.settings,
            noise=1e-4,
            cut_off="drop",
            warn=self.warned.append,
            stopped=self.stopped.append,
        )


def test_numbers_of_a_round_and_those_before_it(tmp_path):
    """Rewards 0, 1 and 1, 1: one of two pairs tied, 3 of 4 at the top. The round before had 0 0 1 1: half of ours lie above 0
    and a quarter below, so the distance at 0 is .5 − .25. Gold fell from .8 to .6 while the reward rose from 1 to 2."""
    candidates = write_candidates(tmp_path)
    before = write_rewards(tmp_path / "before.parquet", [0.0, 0.0, 1.0, 1.0], disagreement=0.25)
    now = write_rewards(tmp_path / "now.parquet", [0.0, 1.0, 1.0, 1.0], disagreement=0.25)
    past = [(9.0, 0.9), (1.0, 0.8), (2.0, 0.6)]
    found = measured(candidates, now, earlier=[before], past=past, window=2)
    # prompt p: rewards −.5 .5 and lengths −.5 .5 around their means; prompt q: 0 0 and −.5 .5: 0.5 / √(.5 · 1)
    assert found.pop("length_correlation") == pytest.approx(math.sqrt(0.5))
    assert found.pop("gold_drop") == pytest.approx(0.2)
    assert found == {"ties": 0.5, "saturation": 0.75, "shift": 0.25, "disagreement": 0.25}


def test_the_signs_are_those_of_the_reward_and_not_of_what_shaping_made_of_it(tmp_path):
    """The rewards 0 1 1 1 as above, of which shaping makes 4 3 2 1, in both rounds."""
    candidates = write_candidates(tmp_path)
    scored = write_rewards(tmp_path / "s.parquet", [4.0, 3.0, 2.0, 1.0], external=[0.0, 1.0, 1.0, 1.0])
    found = measured(candidates, scored, earlier=[scored])
    assert (found["ties"], found["saturation"], found["shift"]) == (0.5, 0.75, 0.0)
    assert found["length_correlation"] == pytest.approx(math.sqrt(0.5))


def test_several_earlier_rounds_are_compared_with_as_one(tmp_path):
    """0 0 0 0 and 1 1 1 1 are half and half, as 0 0 1 1 is."""
    candidates = write_candidates(tmp_path)
    earlier = [write_rewards(tmp_path / f"{v:.0f}.parquet", [v] * 4) for v in (0.0, 1.0)]
    now = write_rewards(tmp_path / "now.parquet", [0.0, 1.0, 0.0, 1.0])
    assert measured(candidates, now, earlier=earlier)["shift"] == 0.0
    assert measured(candidates, now, earlier=earlier[:1])["shift"] == 0.5


def test_a_first_round_has_nothing_to_compare_with(tmp_path):
    r = Round(tmp_path, [1.0, 2.0, 4.0, 3.0])
    found = r.guard()
    assert all(math.isnan(found[name]) for name in ("shift", "disagreement", "gold_drop"))
    assert {
        name: v for name, v in found.items() if name not in ("probe_change", "probe_missing", *NAMES)
    } == pytest.approx(measured(r.candidates, r.scored), nan_ok=True)
    assert r.warned == [] and r.stopped == []
    written = folders.read_json(tmp_path / "guard.json")
    assert written == {name: value if math.isfinite(value) else None for name, value in found.items()}


def test_a_number_above_its_limit_warns_or_stops(tmp_path):
    r = Round(tmp_path, [0.0, 1.0, 1.0, 1.0], saturation={"warn": 0.5}, ties={"stop": 0.4})
    with pytest.raises(GuardError, match=r"the reward looks wrong: .*0\.5, limit 0\.4 \(guard\.ties\.stop\)") as error:
        r.guard()
    assert [w.split("guard.")[1] for w in r.warned] == ["ties.stop)", "saturation.warn)", "length_correlation.warn)"]
    assert str(r.scored) in error.value.hint
    (known,) = r.stopped
    assert (known["ties"], known["saturation"]) == (0.5, 0.75) and all(map(math.isfinite, known.values()))


def test_the_numbers_of_the_probes_are_kept_and_not_told_again(tmp_path):
    r = Round(tmp_path, [1.0, 2.0, 4.0, 3.0], probe_change={"stop": 0.1})
    r.probed = {"probe_change": 0.5, "reward_mean": 2.5}
    found = r.guard()
    assert found["probe_change"] == 0.5 and math.isnan(found["probe_missing"]) and "reward_mean" not in found
    assert r.warned == []


def test_answers_that_can_be_in_no_pair_have_no_part_in_ties_and_saturation(tmp_path):
    """Of prompt p the second answer has the tokens of the first, the third was cut off, the fourth has no reward and the
    fifth is empty. What is left are the first and the sixth, with other rewards."""
    first = dataclasses.replace(answers(1)[0], n_tokens=2)
    rows = [
        first,
        dataclasses.replace(first, index=1),
        dataclasses.replace(first, index=2, token_ids=[7, 8], finish_reason="length"),
        dataclasses.replace(first, index=3, token_ids=[7, 9]),
        dataclasses.replace(first, index=4, token_ids=[], n_tokens=0),
        dataclasses.replace(first, index=5, token_ids=[5, 6, 7, 2], n_tokens=4),
    ]
    candidates = write_candidates(tmp_path, rows)
    scored = write_rewards(tmp_path / "scored.parquet", [1.0, 1.0, 1.0, None, 1.0, 2.0], candidates=rows)
    found = measured(candidates, scored)
    assert (found["ties"], found["saturation"]) == (0.0, 0.5)
    assert found["length_correlation"] == pytest.approx(1.0)
    cut_off_too = measured(candidates, scored, cut_off="reject")  # 1, 1, 2: one of three pairs
    assert (cut_off_too["ties"], cut_off_too["saturation"]) == pytest.approx((1 / 3, 2 / 3))


def test_a_round_of_answers_that_can_be_in_no_pair_has_no_numbers(tmp_path):
    rows = [dataclasses.replace(row, finish_reason="length") for row in answers()]
    candidates = write_candidates(tmp_path, rows)
    found = measured(candidates, write_rewards(tmp_path / "scored.parquet", [1.0, 2.0, 3.0, 4.0]))
    assert all(math.isnan(value) for value in found.values())


def test_files_of_before_are_read_as_those_of_today(tmp_path):
    """With texts and 64-bit token ids beside the rewards, and candidates without digests."""
    rewards, parts = [4.0, None, 2.0, 1.0], [{"external": v, "disagreement": 0.5} for v in (0.0, 1.0, 1.0, 1.0)]
    parts[1] = {}
    rows = [
        ScoredBefore(
            **{k: v for k, v in dataclasses.asdict(c).items() if k not in ("digest", "thinking")},
            reward=r,
            reward_parts=p,
        )
        for c, r, p in zip(answers(), rewards, parts, strict=True)
    ]
    wide = tables.to_table(rows, ScoredBefore)
    place = wide.column_names.index("token_ids")
    wide = wide.set_column(place, "token_ids", wide["token_ids"].cast(pa.list_(pa.int64())))
    before = tmp_path / "before"
    before.mkdir()
    tables.write_table(before / "scored.parquet", wide)
    tables.write_table(before / "candidates.parquet", wide.drop_columns(["reward", "reward_parts", "reference_logp"]))

    candidates, today = write_candidates(tmp_path), tmp_path / "scored.parquet"
    rows_today = [
        Reward(prompt_id=c.prompt_id, index=c.index, reward=r, reward_parts=p)
        for c, r, p in zip(answers(), rewards, parts, strict=True)
    ]
    tables.write_rows(today, rows_today, Reward)

    columns = read_candidates(before / "candidates.parquet")
    read, expected = (read_rewards(path, columns) for path in (before / "scored.parquet", today))
    np.testing.assert_array_equal(read.reward, [4.0, math.nan, 2.0, 1.0])
    np.testing.assert_array_equal(read.external, [0.0, math.nan, 1.0, 1.0])
    np.testing.assert_array_equal(read_external(before / "scored.parquet"), read.external)
    assert read.parts.keys() == expected.parts.keys() == {"external", "disagreement"}
    for name in read.parts:
        np.testing.assert_array_equal(read.parts[name], expected.parts[name])
    old = measured(before / "candidates.parquet", before / "scored.parquet", earlier=[before / "scored.parquet"])
    assert old == pytest.approx(measured(candidates, today, earlier=[today]), nan_ok=True)
    assert (old["shift"], old["disagreement"]) == (0.0, 0.5)


@pytest.mark.parametrize(
    "others",
    [
        lambda rows: rows[:3],
        lambda rows: [dataclasses.replace(row, index=1 - row.index) for row in rows],
        lambda rows: [dataclasses.replace(row, prompt_id="rs"["pq".index(row.prompt_id)]) for row in rows],
    ],
    ids=["fewer", "another order", "other prompts"],
)
def test_rewards_of_other_candidates_are_an_error(tmp_path, others):
    rows = others(answers())
    scored = write_rewards(tmp_path / "scored.parquet", [1.0, 2.0, 3.0, 4.0][: len(rows)], candidates=rows)
    with pytest.raises(CheckpointError, match="has the rewards of other candidates"):
        measured(write_candidates(tmp_path), scored)
