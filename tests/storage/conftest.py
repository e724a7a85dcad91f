import pytest


@pytest.fixture
def runners():
    """Starts processes that hold a run folder (faulty_world.Runner); none outlives its test."""
    from faulty_world import Runner

    started: list[Runner] = []

    def start(*arguments, **more):
        started.append(Runner(*arguments, **more))
        return started[-1]

    yield start
    for each in started:
        each.kill()
