"""The external reward: an HTTP server around a reward model, and the client that the pipeline uses.

Nothing here imports `selfplay`. `selfplay` asks for scores by `reward.client`, has the settings and kinds of rewards in its own
configuration, and shares what both do alike, such as HTTP.
"""
