"""A real language model that two CPU cores can align: SmolLM2-135M-Instruct, with prompts whose constraints a program checks."""
