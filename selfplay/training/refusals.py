"""Settings of TRL's DPOConfig that ε-DPO does not have, and values that its own settings cannot have."""

import math
from typing import Any


def refuse(args: Any) -> None:
    """Raise ValueError for what TRL would take silently and ε-DPO does not do."""
    wrong = [
        (len(args.loss_type) != 1, "several losses at once are not supported: set loss_type='sigmoid'"),
        (args.loss_type[0] != "sigmoid", f"loss_type {args.loss_type[0]!r} has no instance β: set loss_type='sigmoid'"),
        (args.loss_weights not in (None, [1.0]), "loss_weights is not supported: leave it None, scale learning_rate"),
        (args.f_divergence_type != "reverse_kl", "f-divergences are not supported: set f_divergence_type='reverse_kl'"),
        (args.ld_alpha is not None, "ld_alpha re-weights tokens, which ε-DPO does not define: set ld_alpha=None"),
        (args.use_weighting, "WPO weighting is not supported: set use_weighting=False"),
        (args.sync_ref_model, "the reference must stay fixed while β moves: set sync_ref_model=False"),
        (args.precompute_ref_log_probs, "the reference's hidden states are needed: set precompute_ref_log_probs=False"),
        (
            args.use_liger_kernel,
            "Liger kernels replace the forward that stops before the head: set use_liger_kernel=False",
        ),
        (args.padding_free, "padding_free is not supported: set padding_free=False"),
        (not args.disable_dropout, "with dropout the steps would be noise: set disable_dropout=True"),
        (args.logging_nan_inf_filter, "NaN losses must not be hidden: set logging_nan_inf_filter=False"),
    ]
    for is_wrong, what in wrong:
        if is_wrong:
            raise ValueError(what)


def check_limits(args: Any) -> None:
    """Raise ValueError for values for which ε-DPO is not defined."""
    low = 0.0 if args.beta_min is None else args.beta_min
    high = math.inf if args.beta_max is None else args.beta_max
    if not 0 <= args.epsilon < 1:
        raise ValueError(f"epsilon must lie in [0, 1), got {args.epsilon}: set 0.01, or 0 for plain DPO")
    if not (args.beta > 0 and low <= args.beta <= high):
        raise ValueError(f"beta must be positive and in [beta_min, beta_max] = [{low}, {high}], got {args.beta}")
    if not 0 <= args.label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {args.label_smoothing}: 0.5 learns nothing")
    if not args.nll_weight >= 0:
        raise ValueError(f"nll_weight must not be negative, got {args.nll_weight}: 0 leaves the term out")
