"""The external reward: an HTTP server around a reward model, and the client that the pipeline uses.

Nothing here imports `selfplay`; `selfplay` uses `reward.client` and `reward.schema` only.
"""
