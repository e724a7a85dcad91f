"""The stage `score` in a folder of its own, and servers that it asks."""

import contextlib
import hashlib
import json
from types import SimpleNamespace

from fake_reward import fake, send

from selfplay.config import EnsembleConfig, RewardConfig, RewardSource, ShapingConfig
from selfplay.rewards import scoring
from selfplay.rewards.cache import ScoreCache
from selfplay.rewards.scorer import Scorer
from selfplay.storage import tables
from selfplay.types import Candidate, Prompt, Reward

LINE = SimpleNamespace(update=lambda **shown: None)


def length(item):
    return float(len(item["response"]))


@contextlib.contextmanager
def reward(score=length, weights="one"):
    """A server that gives each item what `score` says of it; None is no verdict. It counts the items that it is asked for."""

    def answer(handler, asked):
        server.items += len(asked["items"])
        scores = [server.score(item) for item in asked["items"]]
        errors = ["no verdict" if score is None else None for score in scores]
        given = {"scores": scores, "errors": errors, "ids": [item["id"] for item in asked["items"]]}
        send(handler, 200, json.dumps(given).encode())

    with fake(default=answer) as server:
        server.items, server.score, server.weights = 0, score, weights
        yield server


def without(*texts):
    """The number of characters, but no verdict on some texts."""
    return lambda item: None if item["response"] in texts else length(item)


def rows(n, prompts="p"):
    """Answers of two tokens, evenly to each prompt."""
    each = n // len(prompts)
    return [
        Candidate(
            prompt_id=p, index=i, text=f"answer {i}", token_ids=[i, 2], logp=-1.0, n_tokens=2, finish_reason="stop",
            policy=0,
        )
        for p in prompts
        for i in range(each)
    ]  # fmt: skip


class Stage:
    """The stage in a folder of its own. `servers`: one, or those of an ensemble by their names."""

    def __init__(
        self, folder, servers, candidates=None, *, cache=False, shard_items=4, ensemble=None, deadline=20, **shaped
    ):
        self.folder, self.shard_items = folder, shard_items
        self.candidates = rows(10) if candidates is None else candidates
        folder.mkdir(exist_ok=True)
        self.settings = RewardConfig(model="any", max_missing=0.2, shaping=ShapingConfig(**shaped))
        self.events, self.shards = [], []
        by_name = servers if isinstance(servers, dict) else {"": servers}
        sources = [RewardSource(url=[server.url], deadline=deadline, batch=500) for server in by_name.values()]
        combined = None
        if isinstance(servers, dict):
            members = [{"name": name, "url": [server.url]} for name, server in by_name.items()]
            combined = EnsembleConfig.model_validate({"members": members, **(ensemble or {})})
        self.cache = ScoreCache(folder / "scores.sqlite", 10_000) if cache else None
        self.scorer = Scorer(
            "reward", sources, combined, folder, cache=self.cache, gpus=None, on_event=lambda *said: self.events.append(said)
        )  # fmt: skip
        self.breathe = lambda where: None
        self.probe = lambda: {}
        self.write(self.candidates)

    def write(self, candidates):
        known = list(dict.fromkeys(c.prompt_id for c in candidates))
        asked = [
            Prompt(prompt_id=p, messages=[{"role": "user", "content": p}], prompt_ids=[1], split="train") for p in known
        ]
        tables.write_rows(self.folder / "prompts.parquet", asked, Prompt)
        tables.write_rows(self.folder / "candidates.parquet", candidates, Candidate)

    def score(self):
        """What the stage says of its rewards."""
        return scoring.score(
            self.folder,
            LINE,
            prompts=self.folder / "prompts.parquet",
            candidates=self.folder / "candidates.parquet",
            scorer=self.scorer,
            settings=self.settings,
            shards=self._shards,
            shard_items=self.shard_items,
            probe=lambda: self.probe(),
            breathe=lambda where: self.breathe(where),
            record_event=lambda *said: self.events.append(said),
        )

    def _shards(self, key):
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        self.shards.append(self.folder / f"{digest[:12]}.shards")
        return self.shards[-1]

    @property
    def rows(self):
        return tables.read_rows(self.folder / "scored.parquet", Reward)

    def rewards(self):
        """Do the stage; the rewards in order."""
        self.score()
        return [row.reward for row in self.rows]
