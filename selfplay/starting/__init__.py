"""`selfplay init`: from a model, prompts, a reward and a machine to a configuration that `selfplay check` lets through.

`recognise` says what is there, `presets` has the numbers to begin with, `sizing` changes them until the plan of the memory
confirms them, `writing` writes each with the reason why.
"""
