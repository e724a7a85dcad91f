"""The stage `evaluate`: an engine that answers as told, a real judge behind HTTP, and the comparison by hand."""

import pytest
from fake_reward import fake
from pairs_world import Told
from test_judge import answer, judging, prompt, scored
from test_reward_judge import saying

from selfplay.config import EvaluateConfig
from selfplay.errors import RewardError
from selfplay.evaluation.stage import EVALUATE, audit_metrics, evaluate
from selfplay.storage import folders, tables
from selfplay.types import Policy, Prompt, Scored


def test_the_audit_counts_ties_half_and_leaves_out_what_has_no_score():
    """Rewards 2 > 1, 1 = 1, none: win rate (1 + ½) / 2, means over the two. Gold totals .9 > .5, .5 = .5, .2 < .8."""
    ours = [scored(2.0, total=0.9), scored(1.0, total=0.5), scored(None, total=0.2)]
    initial = [scored(1.0, total=0.5), scored(1.0, total=0.5), scored(9.0, total=0.8)]
    found = audit_metrics(ours, initial)
    assert found["audit_win_rate"] == 0.75
    assert (found["audit_reward"], found["audit_reward_initial"]) == (1.5, 1.0)
    assert found["audit_gold_win_rate"] == pytest.approx(0.5)
    assert found["audit_gold_total"] == pytest.approx(1.6 / 3)
    assert found["audit_gold_total_initial"] == pytest.approx(0.6)
    assert audit_metrics([scored(None)], [scored(1.0)]) == {}
    assert "audit_gold_win_rate" not in audit_metrics([scored(1.0)], [scored(0.0)])


def policy(version):
    return Policy(version=version, path=f"/p/{version}", parent=None, round=version, beta=None, reference=None)


class Engine:
    """Stands in for the engine: each policy says its own word so often as its version, and finds others' words unlikely."""

    def __init__(self):
        self.asked = []

    def side_by_side(self, asked, on_progress):
        self.asked += [(each.name, each.policy.version, [p.prompt_id for p in each.prompts]) for each in asked]
        on_progress(sum(len(each.prompts) for each in asked))
        return [[answer(p, "word " * (1 + each.policy.version)) for p in each.prompts] for each in asked]

    def logps(self, prompts, answers, policies, on_progress):
        self.asked += [("logps", policy.version, [p.prompt_id for p in prompts]) for policy in policies]
        on_progress(len(answers) * len(policies))
        return [[-1.0 - (2 - policy.version) for _ in answers] for policy in policies]


def longer(shown):
    return "VERDICT: A" if len(shown["answer A"]) > len(shown["answer B"]) else "VERDICT: B"


def run(out, *, champion, audit=(), judge_says=longer, dependent=None, **gate):
    out.mkdir()
    engine, line = Engine(), Told()
    gate = {"max_length_ratio": 9, **gate}

    def initial_answers(told):
        told(len(audit))
        return [answer(p, "word") for p in audit]

    with (
        fake(default=saying(judge_says)) as chat,
        judging(
            out.parent, {"chat_judge": {"url": [chat.url], "model": "m", "mode": "pairwise", "deadline": 1.5}},
            lambda messages, text, meta: {"total": len(text.split()) / 10}, max_missing=1.0, dependent=dependent,
        ) as judge,
    ):  # fmt: skip
        metrics = evaluate(
            out, line, champion=policy(champion), candidate=policy(2), initial=policy(0),
            held_out=[prompt(p) for p in "xyz"], audit=audit, engine=engine, initial_answers=initial_answers,
            judge=lambda: judge, settings=EvaluateConfig(gate=gate), seed=0,
            breathe=lambda where: None,
        )  # fmt: skip
    assert all((out / name).is_file() for name in EVALUATE.writes)
    assert line.done == line.total
    return metrics, engine.asked, folders.read_json(out / "verdict.json"), line.text


@pytest.mark.service
def test_the_candidate_is_judged_beside_the_champion_and_the_gate_decides(tmp_path):
    """Its answers have three words, the champion's two: it wins all three. KL: −1 against −2 and −3, so 1 and 2 nats."""
    metrics, asked, verdict, said = run(tmp_path / "out", champion=1)
    assert asked == [
        ("champion", 1, ["x", "y", "z"]), ("candidate", 2, ["x", "y", "z"]), ("audit", 2, []),
        ("logps", 1, ["x", "y", "z"]), ("logps", 0, ["x", "y", "z"]),
    ]  # fmt: skip
    assert (metrics["win_rate"], metrics["kl_current"], metrics["kl_initial"]) == (1.0, 1.0, 2.0)
    assert (metrics["gold_total"], metrics["gold_total_champion"]) == (pytest.approx(0.3), pytest.approx(0.2))
    assert (metrics["tokens"], metrics["independent"], metrics["unscored"]) == (12, 1.0, 0)
    assert verdict == {"promoted": True, "reasons": [], "independent": True}
    assert folders.read_json(tmp_path / "out" / "judge.json") == {"names": ["n"]}
    assert said == "win rate 1.000 [1.000, 1.000]"
    ours, theirs = (tables.read_rows(tmp_path / "out" / f"{n}.parquet", Scored) for n in ("candidate", "champion"))
    assert [a.reward for a in ours] == [1.0] * 3 and [a.reward for a in theirs] == [0.0] * 3
    assert {a.text for a in ours} == {"word " * 3} and {a.reward_parts["total"] for a in theirs} == {0.2}
    assert not (tmp_path / "out" / "audit.parquet").exists()


@pytest.mark.service
def test_in_the_first_round_champion_and_initial_policy_are_one(tmp_path):
    metrics, asked, _, _ = run(tmp_path / "out", champion=0)
    assert [name for name, *_ in asked].count("logps") == 1
    assert metrics["kl_current"] == metrics["kl_initial"] == 2.0


@pytest.mark.service
def test_a_candidate_that_breaks_a_limit_is_not_promoted_and_a_dependent_judge_is_recorded(tmp_path):
    metrics, _, verdict, _ = run(tmp_path / "out", champion=1, max_kl=0.5, dependent="the same weights")
    assert not verdict["promoted"] and "KL to the current policy 1.00 nats" in verdict["reasons"][0]
    assert (verdict["independent"], metrics["independent"]) == (False, 0.0)


@pytest.mark.service
def test_the_audit_is_judged_against_the_initial_policys_answers(tmp_path):
    """One word against three: all are won, and the rubric gives .1 and .3."""
    metrics, asked, _, _ = run(tmp_path / "out", champion=1, audit=[prompt(p) for p in "uv"])
    assert ("audit", 2, ["u", "v"]) in asked
    assert (metrics["audit_win_rate"], metrics["tokens"]) == (1.0, 16)
    assert metrics["audit_gold_total"] == pytest.approx(0.3)
    assert metrics["audit_gold_total_initial"] == pytest.approx(0.1)
    for name, text in (("audit", "word " * 3), ("audit_initial", "word")):
        rows = tables.read_rows(tmp_path / "out" / f"{name}.parquet", Scored)
        assert [r.text for r in rows] == [text] * 2
    kept = tables.read_rows(tmp_path / "out" / "audit_prompts.parquet", Prompt)  # to be read beside the answers
    assert kept == [prompt(p) for p in "uv"]


@pytest.mark.service
def test_where_nothing_can_be_compared_the_stage_fails(tmp_path):
    with pytest.raises(RewardError, match="scored no prompt of the gate for both policies"):
        run(tmp_path / "out", champion=1, judge_says=lambda shown: "I cannot say.")
