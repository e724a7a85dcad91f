import pytest


@pytest.fixture
def run(tmp_path):
    """A made-up run of five rounds, and what the service says of itself."""
    from served_world import Progress, build

    store = build(tmp_path / "run", rounds=5, pairs=20)
    yield tmp_path / "run", Progress()
    store.close()


@pytest.fixture
def client(run):
    """Asks the API of that run, in the test's own process."""
    from served_world import config
    from starlette.testclient import TestClient

    from selfplay.web.api import create_app

    return TestClient(create_app(run[0], config(), run[1], None, page=False), base_url="http://localhost")
