"""A deterministic simulation of the service: seeded histories of rounds, orders and faults, on a virtual clock.

`world.py` has the clock, the faults and the people outside; `disk.py` and `database.py` are the boundary to files and ledger,
`paths.py` and `texts.py` do what `pathlib` and `json` do in fewer steps,
`processes.py` and `stages.py` stand for the children, `boundary.py` puts them in their places, `beginnings.py` lays out the
folders that histories begin with, `invariants.py` says what has to hold, and `history.py` runs a seed.

Real is all that decides and commits:
- the daemon: its loop, its orders, schedule and starts, failures and retries, stalls, stop and drain, reload;
- the order of a round (`rounds/round.py`), how it resumes, is given up and is closed, and rollback;
- which policy samples a round, also ahead of it (`rounds/ahead.py`);
- the frame of a stage: its folder, its manifest, its hashes, its record; the stage `promote`;
- which policy serves (`generation/serving.py`), policies, their manifests and `current`, references, retention;
- what is drawn of the pool (`prompts/draws.py`), the lock of the folder, and opening and reconfiguring a run;
- the ledger: its statements and triggers, in SQLite through SQLAlchemy.

Not real is:
- the clock: waits, time-outs and timers pass at once; threads of the service run at its virtual times;
- the engines, the trainer, the reward and the importer, each an object that fails, hangs or dies as the seed says;
- what the stages compute: each writes one small file of JSON, a digest of what it was made from (no Parquet);
- the admission of prompts that are added, and the files of the pool;
- whether the file system has locks, which a start tries: they are taken alone;
- where the ledger lies: in memory, and all connections are one. Each commit holds, as it does with synchronous=FULL;
- fsync: files and names that were not synced may be lost or cut short when the power fails. Deletions are never lost;
- stages that are off by default (evolve, suite), several engines, moving averages, the webhook, the trackers.
"""
