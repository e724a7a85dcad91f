"""Who judges at the gate."""

from types import SimpleNamespace

import pytest
from test_reward_client import fake
from test_reward_judge import saying

from selfplay.config import RewardSource
from selfplay.evaluation import evaluate
from selfplay.rewards.scorer import Scorer
from selfplay.storage import folders
from selfplay.storage.ledger import Store
from selfplay.types import Candidate, Prompt


@pytest.mark.parametrize(
    ("configured", "reward", "judge", "expected"),
    [
        (False, ["one/t/float32"], ["one/t/float32"], False),
        ({"model": "same", "heads": {"a": 1}}, ["one/t/float32"], ["two/t/float32"], False),  # heads of one model
        (True, ["one/t/float32"], ["two/t/float32"], True),
        (True, ["two/t/float32", "one/t/float32"], ["one/u/bfloat16"], False),  # the same weights under another name
        (True, [""], [""], True),  # servers that tell nothing: the configuration is believed
        (True, None, ["one/t/float32"], True),  # a round that was scored before this was recorded
    ],
)
def test_a_gate_is_independent_where_other_weights_judge(tmp_path, configured, reward, judge, expected):
    warned, noted = [], []
    source = configured if isinstance(configured, dict) else {"model": "other"}
    configured = bool(configured)
    scorers = [SimpleNamespace(sources=[RewardSource.model_validate(s)]) for s in ({"model": "same"}, source)]
    r = SimpleNamespace(
        dir=tmp_path / "rounds" / "0001",
        index=1,
        config=SimpleNamespace(evaluate=SimpleNamespace(judge=object() if configured else None)),
        run=SimpleNamespace(
            store=Store(tmp_path),
            display=SimpleNamespace(warn=warned.append, note=noted.append),
            reward=scorers[0],
            judge=scorers[1],
        ),
    )
    (r.dir / "score").mkdir(parents=True)
    if reward is not None:
        folders.write_json(r.dir / "score" / "reward.json", {"identities": reward})
    assert evaluate.independent(r, judge) is expected
    assert len(warned) == (configured and not expected) and len(noted) == (not configured)
    assert ["gate not independent" in e["text"] for e in r.run.store.events(1)] == [True] * (not expected)


def test_another_judge_than_at_the_last_gate_is_told(tmp_path):
    warned = []
    run = SimpleNamespace(dir=tmp_path, store=Store(tmp_path), display=SimpleNamespace(warn=warned.append))
    for index, name in ((1, "other"), (3, "one")):
        folder = tmp_path / "rounds" / f"{index:04d}" / "evaluate"
        folder.mkdir(parents=True)
        folders.write_json(folder / "judge.json", {"names": [name]})
    evaluate._notice_another_judge(SimpleNamespace(run=run, index=5), ["one"])
    assert warned == []
    evaluate._notice_another_judge(SimpleNamespace(run=run, index=5), ["two"])
    assert warned == ["another judge decides at this gate than in round 3: two instead of one"]


def test_a_pairwise_judge_compares_candidate_and_champion(tmp_path):
    """It likes the longer answer; at equal texts it is not asked: a tie."""

    def said(shown):
        a, b = shown["answer A"], shown["answer B"]
        return "VERDICT: A" if len(a) > len(b) else "VERDICT: B"

    prompts = [
        Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="heldout") for p in "pqr"
    ]
    candidate, champion = (
        [
            Candidate(
                prompt_id=p.prompt_id, index=0, text=text, token_ids=[5, 2], logp=-1.0, n_tokens=2, finish_reason="stop", policy=0
            )
            for p, text in zip(prompts, texts, strict=True)
        ]
        for texts in (["long answer", "short", "same"], ["short", "longer answer", "same"])
    )  # fmt: skip
    with fake(default=saying(said)) as chat:
        source = RewardSource.model_validate({"chat_judge": {"url": [chat.url], "model": "m", "mode": "pairwise"}})
        judge = Scorer("judge", [source], None, tmp_path, cache=None, gpus=None, on_event=lambda kind, text: None)
        r = SimpleNamespace(
            run=SimpleNamespace(judge=judge, gold=None, breathe=lambda where: None),
            config=SimpleNamespace(reward=SimpleNamespace(max_missing=0.0)),
        )
        try:
            ours, theirs = evaluate._judged(r, prompts, candidate, champion, judge.identities)
        finally:
            judge.stop()
    assert [a.reward for a in ours] == [1.0, 0.0, 0.5] and [b.reward for b in theirs] == [0.0, 1.0, 0.5]
    assert [a.text for a in ours] == [c.text for c in candidate]
