from selfplay.reporting import gold
from selfplay.storage.ledger import Store


def test_parts_are_named_by_the_metrics_and_total_comes_first():
    names = [
        "evaluate/audit_gold_style", "evaluate/audit_gold_style_initial", "evaluate/audit_gold_win_rate", "evaluate/gold_accuracy",
        "evaluate/gold_accuracy_champion", "evaluate/gold_total", "evaluate/gold_total_champion", "evaluate/reward", "guard/gold_drop",
    ]  # fmt: skip
    assert gold.parts(names) == ["total", "accuracy", "style"]
    assert gold.parts(["evaluate/win_rate", "score/gold_content"]) == []
    assert {*gold.champion_and_candidate("accuracy"), *gold.initial_and_candidate("style")} < set(names)


def test_the_parts_of_a_run_are_those_of_its_last_rounds(tmp_path):
    store = Store(tmp_path)
    assert gold.recorded(store) == []
    for index in range(1, gold.RECENT + 2):
        store.open_round(index, 0, (0, 0), "f", {})
        part = "old" if index == 1 else "accuracy"
        store.record_stage(index, "evaluate", 1.0, {"gold_total": 0.5, f"gold_{part}": 0.5, "reward": 1.0})
    assert gold.recorded(store) == ["total", "accuracy"]
    store.close()
