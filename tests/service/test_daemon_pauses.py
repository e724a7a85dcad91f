"""When the service pauses for what came of its rounds, and what it says then: rounds only pretend here."""

from datetime import timedelta

import pytest

from selfplay.errors import InputError


def test_a_round_that_ends_well_starts_the_count_anew(world):
    service = world("service.retry_seconds=0", "service.retries=1")
    fails = [True, False, True, False]

    def work():
        if fails.pop(0):
            raise ConnectionError("the network is down")

    service.work = work
    for _ in range(4):
        service.turn()
    assert [row["state"] for row in service.store.rounds()] == ["promoted"] * 2 and service.store.state("pause") is None


def test_rejected_rounds_pause_the_service_whatever_is_killed_when(world):
    service = world("service.pause_after_rejected=2")
    for _ in range(2):
        service.open()
        service.close("rejected")
    service.made()  # killed between the end of the round and the next word
    service.turn()
    assert service.turn() == "paused" and service.ran == []
    pause = service.store.state("pause")
    assert (pause["kind"], pause["why"]) == (
        "rejected",
        "2 rounds in a row were rejected, the last because: it is longer",
    )
    service.order("resume")
    service.outcome = "rejected"
    service.turn()
    assert service.ran == [3]
    assert service.turn() == "paused" and service.ran == [3]  # the third in a row


def test_a_pause_for_rejected_rounds_does_not_keep_orders_waiting_for_a_run_that_failed_to_open_before(world):
    service = world("service.pause_after_rejected=2", "service.retry_seconds=60")
    for _ in range(2):
        service.open()
        service.close("rejected")
    service.made()
    service.daemon._failures.add(OSError("the disk was full"), service.daemon.config.service, service.now)
    service.now += timedelta(seconds=61)
    service.turn()
    assert service.turn() == "paused"
    assert service.daemon.run is not None


def test_a_ledger_that_is_put_away_while_a_run_waits_for_its_next_try_is_missed(world):
    service = world("service.retry_seconds=60")
    service.made()
    service.daemon._open_ledger()
    service.daemon._failures.add(OSError("the disk was full"), service.daemon.config.service, service.now)
    (service.run_dir / "pool").mkdir()
    (service.run_dir / "pool" / "initial.json").write_text("{}")
    for file in service.run_dir.glob("ledger.sqlite*"):
        file.unlink()
    service.now += timedelta(seconds=61)
    with pytest.raises(InputError, match="is gone"):
        service.turn()


def test_skipped_rounds_pause_the_service_and_say_what_to_change(world):
    """Two rounds of 32 prompts: nothing ends in the first, and the rewards of the second are nearly all the same."""
    service = world("service.pause_after_rejected=2")
    lost = [
        (1.0, {"base": 0, "prompts_cut_off": 32}),
        (0.75, {"base": 2, "prompts_tied": 24, "prompts_unscored": 6, "dropped_noise": 2}),
    ]
    for cut_off, pairs in lost:
        service.open()
        index = len(service.store.rounds())
        service.store.record_stage(index, "generate", 1.0, {"cut_off_share": cut_off})
        service.store.record_stage(index, "pairs", 1.0, pairs)
        service.close("skipped")
    service.made()
    service.turn()
    assert service.turn() == "paused" and service.ran == []
    pause = service.store.state("pause")
    assert pause["kind"] == "skipped"
    assert pause["why"] == (
        "2 rounds in a row were skipped, for no pair was left to train on: of 64 prompts, 32 prompts with every answer cut off, "
        "6 without two scored answers, 24 with equal rewards, 2 margins within the reward's noise; 88% of the answers were cut "
        "off; what to change: let answers end: raise generate.max_tokens, or name the token that ends a turn in "
        "generate.stop_token_ids"
    )
    assert service.events("alert") == [f"paused: {pause['why']}"]
    service.order("resume")
    service.outcome = "skipped"
    service.turn()
    assert service.ran == [3]
    assert service.turn() == "paused" and service.ran == [3]  # the third in a row


def test_rejected_and_skipped_rounds_in_turn_pause_the_service_too(world):
    service = world("service.pause_after_rejected=3")
    for state in ("promoted", "rejected", "skipped", "rejected"):
        service.open()
        service.close(state)
    service.made()
    service.turn()
    assert service.turn() == "paused"
    pause = service.store.state("pause")
    assert pause["kind"] == "rejected" and pause["why"].startswith(
        "3 rounds in a row changed nothing: 2 were rejected, 1 skipped"
    )
    assert pause["why"].endswith("the last because: it is longer")
    service.order("resume")
    service.outcome = "promoted"
    service.turn()
    service.outcome = "skipped"
    for _ in range(2):
        service.turn()
    assert service.ran == [5, 6, 7] and service.store.state("pause") is None  # two after a promoted one
