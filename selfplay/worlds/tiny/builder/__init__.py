"""Builds a tiny world: a policy and reward models from scratch, train and held-out prompts. No downloads.

1. prompts (`examples`): the questions of the world, split by a hash of their text.
2. policy (`tokenizer`, `policy`): a byte-level BPE and a Llama of about 1 M parameters, trained on answers of mixed quality.
3. samples (`reward`): that policy answers train prompts, and the gold rubric grades the answers.
4. reward model (`reward`): a sequence classifier on the policy's body, trained by Bradley-Terry on graded groups of answers.
5. judge (`reward`): another one for the gate. Its groups are fewer, drawn and answered under other seeds, and graded by
   other raters.
6. figures (`measure`): what came out is measured on held-out prompts and written to world.json.

Worker processes of one thread each share every step (`worker`, started by `build`). There are two of them whatever the
machine has, and one for the miniature, so the result depends on the recipe alone (`recipe`).
"""
